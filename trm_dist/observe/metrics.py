"""The run as Prometheus sees it: GET /metrics on the writer; beside it /healthz, for a probe.

What counts over the whole run (batches, samples, optimizer steps) is read from the run's own
counters, so a restart does not set it back. What counts events is of this start, as Prometheus
expects of a process.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from trm_dist import events
from trm_dist.errors import ConfigError
from trm_dist.events import Emit, Event
from trm_dist.progress import Progress

logger = logging.getLogger(__name__)

Health = Callable[[], tuple[bool, dict[str, Any]]]
"""Returns whether all is well, and what there is to say."""

Totals = Callable[[], Mapping[str, float]]
"""Returns seconds by what they were spent on."""

_SPENT = "Seconds of this start by what they were spent on; productive ones may be lost later."
_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """A listener that keeps the newest values."""

    def __init__(self, totals: Totals = dict) -> None:
        """Name everything.

        Args:
            totals: Asked for each GET what the seconds of this start were spent on.

        Raises:
            ConfigError: prometheus_client is not installed.
        """
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
            from prometheus_client.core import CounterMetricFamily
        except ImportError as error:
            raise ConfigError(
                "--metrics-port needs prometheus_client: pip install 'trm_dist[metrics]'."
            ) from error
        self.registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self.registry}
        self._gauges = {name: Gauge(f"trm_{name}", text, **known) for name, text in _GAUGES.items()}
        self._counters = {
            name: Counter(f"trm_{name}", text, **known) for name, text in _COUNTERS.items()
        }
        self._seconds = {
            name: Histogram(f"trm_{name}", text, buckets=_BUCKETS_S, **known)
            for name, text in _SECONDS.items()
        }
        spent = partial(CounterMetricFamily, "trm_spent_seconds", _SPENT, labels=["on"])
        self.registry.register(_Spent(totals, spent))
        self._at_s = dict.fromkeys(_AGES, time.time())
        self._set(start_time_seconds=time.time())
        for name in _AGES:
            self._gauges[f"{name}_age_seconds"].set_function(partial(self._age_s, name))

    def serve(self, port: int, health: Health) -> None:
        """Answer on a port; one that is taken is told, and training goes on without.

        Args:
            port: Of all addresses.
            health: Asked for each GET /healthz.
        """
        from prometheus_client import make_wsgi_app, start_http_server

        try:
            server, _ = start_http_server(port, registry=self.registry)
        except OSError as error:
            logger.warning("--metrics-port %d: no metrics, as it cannot be used (%s)", port, error)
            return
        server.set_app(_with_health(make_wsgi_app(self.registry), health))

    def __call__(self, event: Event) -> None:
        """Take over what an event says."""
        if not isinstance(event, events.Committed):  # which tells of the past
            self._show_progress(event.progress)
        take = _TAKE.get(type(event))
        if take:
            take(self, event)

    def _show_progress(self, at: Progress) -> None:
        for name, value in (
            ("epoch", at.epoch),
            ("batch_count", at.batch_count),
            ("global_step", at.global_step),
            ("samples_seen", at.samples_seen),
        ):
            self._gauges[name].set(value)

    def _age_s(self, name: str) -> float:
        return time.time() - self._at_s[name]

    def _start(self, event: events.Started) -> None:
        self._set(
            world_size=event.world_size,
            batches=event.total_batches,
            parameters=event.num_parameters,
            generation=event.generation,
            failures=event.failures,
            preemptions=event.preemptions,
        )
        self._counters["restarts"].inc(event.restarts)

    def _batch(self, event: events.Batch) -> None:
        self._set(
            loss=event.loss,
            token_accuracy=event.token_accuracy,
            exact_accuracy=event.exact_accuracy,
            learning_rate=event.lr,
        )
        self._at_s["batch"] = time.time()
        if event.has_snapshot:
            self._at_s["snapshot"] = time.time()
        self._counters["samples"].inc(event.num_samples)
        self._seconds["batch_seconds"].observe(event.seconds)

    def _evaluate(self, event: events.Evaluated) -> None:
        self._set(
            evaluation_token_accuracy=event.token_accuracy,
            evaluation_exact_accuracy=event.exact_accuracy,
        )
        self._seconds["evaluation_seconds"].observe(event.seconds)

    def _commit(self, event: events.Committed) -> None:
        self._at_s["checkpoint"] = time.time()
        self._set(checkpoint_bytes=event.num_bytes)
        self._counters["checkpoint_wait_seconds"].inc(event.waited_s)
        self._seconds["checkpoint_seconds"].observe(event.seconds)

    def _fail(self, _event: events.CommitFailed) -> None:
        self._counters["checkpoint_failures"].inc()

    def _skip(self, _event: events.Skipped) -> None:
        self._counters["skipped_batches"].inc()

    def _diverge(self, _event: events.Diverged) -> None:
        self._counters["diverged_batches"].inc()

    def _set(self, **values: float) -> None:
        for name, value in values.items():
            self._gauges[name].set(value)


class _Spent:
    """The seconds of this start, when they are asked for."""

    def __init__(self, totals: Totals, family: Callable[[], Any]) -> None:
        self._totals, self._family = totals, family

    def collect(self) -> Iterable[Any]:
        """Yield one family, with a sample for each thing that time is spent on."""
        family = self._family()
        for name, seconds in self._totals().items():
            family.add_metric([name], seconds)
        yield family


def both(first: Emit, second: Emit) -> Emit:
    """Return a listener that passes events on to two."""

    def emit(event: Event) -> None:
        first(event)
        second(event)

    return emit


def _with_health(metrics: WSGIApplication, health: Health) -> WSGIApplication:
    """Return an application that answers /healthz itself: 200 when all is well, else 503."""

    def answer(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environment["PATH_INFO"] != "/healthz":
            return metrics(environment, start_response)
        is_well, content = health()
        status = "200 OK" if is_well else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(content).encode() + b"\n"]

    return answer


_AGES = ("batch", "snapshot", "checkpoint")
_GAUGES = {
    "epoch": "Epoch of the newest batch, from 1.",
    "batch_count": "Batches completed in the run.",
    "batches": "Batches of the whole run.",
    "global_step": "Optimizer steps made in the run.",
    "samples_seen": "Samples trained on in the run.",
    "world_size": "Workers of this start.",
    "parameters": "Trainable parameters.",
    "loss": "Loss of the newest batch.",
    "token_accuracy": "Share of right tokens in the newest batch.",
    "exact_accuracy": "Share of samples in the newest batch that are right as a whole.",
    "learning_rate": "Learning rate of the newest optimizer step.",
    "evaluation_token_accuracy": "Share of right tokens in the newest evaluation.",
    "evaluation_exact_accuracy": "Share of samples that are right as a whole, newest evaluation.",
    "checkpoint_bytes": "Size of the newest checkpoint.",
    "start_time_seconds": "When this start began, since the epoch.",
    "batch_age_seconds": "Since the newest batch, or since this start.",
    "snapshot_age_seconds": "Since the newest copy into memory, or since this start.",
    "checkpoint_age_seconds": "Since the newest commit, or since this start.",
    "generation": "Number of the writer in the run's record.",
    "failures": "Starts in a row that had failed without a new batch when the writer began.",
    "preemptions": "Starts in a row that were stopped from outside without a new batch.",
}
_COUNTERS = {
    "restarts": "How often the launcher of the writer's node has started the workers again.",
    "samples": "Samples trained on in this start.",
    "checkpoint_failures": "Publishes that the store refused in this start.",
    "checkpoint_wait_seconds": "Time for which training has waited for publishes in this start.",
    "skipped_batches": "Batches left early because something was not finite, in this start.",
    "diverged_batches": "Replayed batches that gave another loss than before, in this start.",
}
_SECONDS = {
    "batch_seconds": "Time of a batch.",
    "evaluation_seconds": "Time of an evaluation.",
    "checkpoint_seconds": "Time of publishing a checkpoint, beside which training goes on.",
}
_TAKE: dict[type[Event], Callable[[Metrics, Any], None]] = {
    events.Started: Metrics._start,
    events.Batch: Metrics._batch,
    events.Evaluated: Metrics._evaluate,
    events.Committed: Metrics._commit,
    events.CommitFailed: Metrics._fail,
    events.Skipped: Metrics._skip,
    events.Diverged: Metrics._diverge,
}
