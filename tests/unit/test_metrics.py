"""What Prometheus is told, read back over HTTP by its own parser."""

import json
import socket
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trm_dist import events
from trm_dist.observe.metrics import Metrics, both
from trm_dist.progress import Progress

AT = Progress(epoch=2, batch_idx=3, batch_count=13, global_step=26, samples_seen=130)


def scraped(port: int) -> dict[str, float]:
    """Everything without labels, by its name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def batch(loss: float = 0.5, seconds: float = 0.2) -> events.Batch:
    return events.Batch(
        progress=AT, loss=loss, token_accuracy=0.7, exact_accuracy=0.1, mean_steps=2.0, lr=1e-3,
        num_samples=10, seconds=seconds,
    )  # fmt: skip


def committed(waited_s: float) -> events.Committed:
    return events.Committed(
        progress=AT, names=["checkpoint_latest.pt"], num_bytes=1000, seconds=0.5, waited_s=waited_s
    )


def test_seconds_are_told_by_what_they_are_spent_on(port: int) -> None:
    seconds = {"productive": 90.0, "startup": 4.0}
    Metrics(lambda: seconds).serve(port, lambda: (True, {}))

    def told() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        return {
            sample.labels["on"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "trm_spent_seconds_total"
        }

    assert told() == seconds
    seconds["productive"] = 95.5
    assert told() == seconds


def test_events_become_what_prometheus_reads(port: int) -> None:
    metrics = Metrics()
    metrics.serve(port, lambda: (True, {}))
    for event in (
        events.Started(
            progress=AT, source="", world_size=4, settings={}, num_parameters=7, num_samples=100,
            notes={}, batches_per_epoch=10, total_batches=80, restarts=3, generation=5, failures=1,
            preemptions=2,
        ),
        batch(), batch(loss=0.25), committed(1.5), committed(0.25),
        events.CommitFailed(progress=AT, error="full", num_failures=1, retry_in_s=1.0),
        events.Evaluated(
            progress=AT, token_accuracy=0.9, exact_accuracy=0.4, mean_steps=1.5, num_samples=30,
            seconds=2.0,
        ),
        events.Skipped(progress=AT, samples=[1, 2]),
    ):  # fmt: skip
        metrics(event)
    found = scraped(port)
    wanted = {
        "trm_epoch": 2, "trm_batch_count": 13, "trm_global_step": 26, "trm_samples_seen": 130,
        "trm_loss": 0.25, "trm_learning_rate": 1e-3, "trm_samples_total": 20,
        "trm_batch_seconds_count": 2, "trm_batch_seconds_sum": 0.4, "trm_checkpoint_bytes": 1000,
        "trm_checkpoint_seconds_count": 2, "trm_checkpoint_wait_seconds_total": 1.75,
        "trm_checkpoint_failures_total": 1, "trm_evaluation_exact_accuracy": 0.4,
        "trm_skipped_batches_total": 1, "trm_restarts_total": 3, "trm_generation": 5,
        "trm_failures": 1, "trm_preemptions": 2, "trm_world_size": 4, "trm_batches": 80,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert 0 <= found["trm_checkpoint_age_seconds"] < 60


def test_port_that_is_taken_is_told_and_done_without(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("0.0.0.0", port)):
        Metrics().serve(port, lambda: (True, {}))
    assert f"--metrics-port {port}: no metrics" in caplog.text


def test_ages_are_since_the_start_until_something_is_there(port: int) -> None:
    metrics = Metrics()
    metrics.serve(port, lambda: (True, {}))
    time.sleep(0.2)
    ages = ("trm_batch_age_seconds", "trm_snapshot_age_seconds", "trm_checkpoint_age_seconds")
    assert all(0.2 <= scraped(port)[name] < 60 for name in ages)
    assert scraped(port)["trm_start_time_seconds"] == pytest.approx(time.time(), abs=60)
    before = scraped(port)
    metrics(replace(batch(), has_snapshot=False))
    after = scraped(port)
    assert after["trm_batch_age_seconds"] < before["trm_batch_age_seconds"]
    assert after["trm_snapshot_age_seconds"] > before["trm_snapshot_age_seconds"]


def test_healthz_says_how_it_goes(port: int) -> None:
    answers = [(True, {"batch_count": 7}), (False, {"batch_count": 8})]
    Metrics().serve(port, lambda: answers.pop(0))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
        assert json.load(answer) == {"batch_count": 7}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz")
    assert refused.value.code == 503
    with refused.value as answer:
        assert json.load(answer) == {"batch_count": 8}


def test_both_listeners_hear_everything() -> None:
    heard: list[tuple[int, events.Event]] = []
    emit = both(lambda event: heard.append((1, event)), lambda event: heard.append((2, event)))
    event = batch()
    emit(event)
    assert heard == [(1, event), (2, event)]
