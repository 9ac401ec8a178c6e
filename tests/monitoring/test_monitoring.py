"""Alerts, dashboard and metrics with the real Prometheus: Debian's package `prometheus`."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.elastic.harness import Training, kill, training

HERE = Path(__file__).parent
FILES = HERE.parents[1] / "k8s" / "monitoring"
ALERTS = FILES / "alerts.yaml"
NAME = re.compile(r"\btrm_[a-z_]+")

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="apt-get install prometheus"
)


def dashboard_queries() -> list[str]:
    dashboard = json.loads((FILES / "dashboard.json").read_text())
    panels = [each["expr"] for panel in dashboard["panels"] for each in panel["targets"]]
    return panels + [each["expr"] for each in dashboard["annotations"]["list"]]


def promtool(*arguments: str, directory: Path) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_prometheus
def test_rules_and_example_are_what_prometheus_reads() -> None:
    assert "6 rules found" in promtool("check", "rules", "alerts.yaml", directory=FILES)
    promtool("check", "config", "prometheus.yaml", directory=FILES)


@needs_prometheus
def test_each_alert_fires_when_it_should_and_alone(tmp_path: Path) -> None:
    tests = shutil.copy(HERE / "alerts_test.yaml", tmp_path)
    shutil.copy(ALERTS, tmp_path)
    promtool("test", "rules", "alerts_test.yaml", directory=tmp_path)
    named = set(re.findall(r"alert: (\w+)", ALERTS.read_text()))
    assert named == set(re.findall(r'alertname="(\w+)"', Path(tests).read_text()))


def test_panels_lie_side_by_side() -> None:
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    places = [
        (x, y)
        for each in (panel["gridPos"] for panel in panels)
        for x in range(each["x"], each["x"] + each["w"])
        for y in range(each["y"], each["y"] + each["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        content: bytes = answer.read()
        return content


class Prometheus:
    """A server that scrapes a port every second."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def query(self, text: str) -> list[dict[str, Any]]:
        """The result of an instant query."""
        answer = json.loads(get(f"{self._url}/query?" + urllib.parse.urlencode({"query": text})))
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def value(self, text: str) -> float:
        """The only value of a query; -1: there is none."""
        found = self.query(text)
        return float(found[0]["value"][1]) if found else -1.0

    def rules(self) -> list[dict[str, Any]]:
        """All rules, after their first evaluation."""
        groups = json.loads(get(f"{self._url}/rules"))["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def prometheus(directory: Path, target: int) -> Iterator[Prometheus]:
    (port,) = free_ports(1)
    shutil.copy(ALERTS, directory)
    example = (FILES / "prometheus.yaml").read_text()
    config = example.replace("15s", "1s").replace("localhost:9400", f"127.0.0.1:{target}")
    (directory / "prometheus.yaml").write_text(config)
    command = [
        "prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    finally:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in servers]
    for each in servers:
        each.close()
    return ports


def wait_for(run: Training, holds: Callable[[], bool], what: str) -> None:
    def patiently() -> bool:
        time.sleep(0.2)
        try:
            return holds()
        except OSError:  # not up yet, or between two starts
            return False

    run.wait_for(patiently, what)


@needs_prometheus
def test_prometheus_scrapes_a_run_through_a_restart(tmp_path: Path) -> None:
    (target,) = free_ports(1)
    flags = {"--metrics-port": str(target), "--epochs": "1000", "--eval-interval": "20"}
    (tmp_path / "server").mkdir()
    with (
        training(tmp_path / "checkpoints", launch=2, flags=flags) as run,
        prometheus(tmp_path / "server", target) as server,
    ):
        wait_for(run, lambda: server.value("trm_batch_count") > 25, "batches in Prometheus")
        before = server.value("trm_batch_count")
        kill(run.named("trm worker 0"))
        wait_for(run, lambda: server.value("trm_restarts_total") == 1, "a restart in Prometheus")
        wait_for(run, lambda: server.value("trm_samples_total") > 50, "samples after it")
        wait_for(run, lambda: server.value("trm_checkpoint_bytes") > 0, "a checkpoint")
        wait_for(run, lambda: server.value("trm_evaluation_exact_accuracy") >= 0, "an evaluation")
        assert server.value("trm_batch_count") > before
        assert server.value("changes(trm_start_time_seconds[5m])") == 1
        assert server.value("trm_world_size") == 2
        health = json.loads(get(f"http://127.0.0.1:{target}/healthz"))
        assert health["batch_count"] >= before
        told = get(f"http://127.0.0.1:{target}/metrics").decode()
        for text in dashboard_queries():
            query = text.replace("$instance", ".*").replace("$__rate_interval", "30s")
            assert server.query(query), f"nothing for {query}"
        wait_for(run, lambda: {each["health"] for each in server.rules()} == {"ok"}, "rules")
        assert [each["name"] for each in server.rules() if each["state"] == "firing"] == []
    known = set(re.findall(r"^(trm_[a-z_]+)", told, re.MULTILINE))
    used = set(NAME.findall(" ".join(dashboard_queries()) + ALERTS.read_text()))
    assert used - {"trm_dist"} <= known
