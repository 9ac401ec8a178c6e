"""Metadata services of AWS, GCP and Azure on loopback, as their documentation has them."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

AWS_TOKEN = "a-token"
MACHINE = "spot-pool_3"


@dataclass
class Service:
    """One provider's service; what it says can be changed while it runs."""

    provider: str
    url: str = ""
    is_noticed: bool = False
    is_rebalanced: bool = False
    refuses_tokens: bool = False
    has_forgotten_tokens: bool = False
    delay_s: float = 0.0
    events: list[dict[str, object]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Answer one request."""
        self.asked.append(f"{method} {path}")
        time.sleep(self.delay_s)
        known = {"aws": self._aws, "gcp": self._gcp, "azure": self._azure}
        return known[self.provider](method, path, headers)

    def _aws(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if path == "/latest/api/token":
            if self.refuses_tokens or "x-aws-ec2-metadata-token-ttl-seconds" not in headers:
                return 403, ""
            self.has_forgotten_tokens = False
            return (200, AWS_TOKEN) if method == "PUT" else (405, "")
        if headers.get("x-aws-ec2-metadata-token") != AWS_TOKEN or self.has_forgotten_tokens:
            return 401, ""
        said: dict[str, dict[str, str]] = {}
        if self.is_noticed:
            said["spot/instance-action"] = {"action": "terminate", "time": "2026-11-25T22:00:00Z"}
        if self.is_rebalanced:
            said["events/recommendations/rebalance"] = {"noticeTime": "2026-11-25T21:00:00Z"}
        found = said.get(path.removeprefix("/latest/meta-data/"))
        return (200, json.dumps(found)) if found else (404, "")

    def _gcp(self, _method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if headers.get("metadata-flavor") != "Google":
            return 403, ""
        instance = "/computeMetadata/v1/instance/"
        known = {
            f"{instance}id": "4520031799277581759",
            f"{instance}preempted": "TRUE" if self.is_noticed else "FALSE",
            f"{instance}maintenance-event": "NONE",
        }
        return (200, known[path]) if path in known else (404, "")

    def _azure(self, _method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if headers.get("metadata") != "true":
            return 400, ""
        if path.startswith("/metadata/instance/compute/name?api-version="):
            return 200, MACHINE
        if path.startswith("/metadata/scheduledevents?api-version="):
            mine = {"EventId": "1", "EventType": "Preempt", "Resources": [MACHINE]}
            events = [*self.events, *([mine] if self.is_noticed else [])]
            return 200, json.dumps({"DocumentIncarnation": 1, "Events": events})
        return 404, ""


@contextmanager
def service(provider: str) -> Iterator[Service]:
    """Run a provider's service."""
    running = Service(provider)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            code, body = running.answer(self.command, self.path, headers)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET  # noqa: N815 the name is http.server's

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        running.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield running
        server.shutdown()
