"""Events as lines: a bar on a terminal, short lines elsewhere, or every event as a JSON object."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from trm_dist import events
from trm_dist.events import Emit, Event
from trm_dist.logs import say
from trm_dist.observe.rate import Rate, duration

logger = logging.getLogger(__name__)


def console(log_format: str, *, log_every_s: float) -> Emit:
    """Return the listener for one of the two forms; text is a bar where stderr is a terminal."""
    if log_format == "json":
        return print_json
    if not sys.stderr.isatty():
        return TextLines(log_every_s)
    from trm_dist.observe.bar import Bar

    bar, lines = Bar(), TextLines(math.inf)

    def show(event: Event) -> None:
        bar(event)
        lines(event)

    return show


def only_trouble(event: Event) -> None:
    """Log what the writer cannot know; for workers that do not speak for the run."""
    if isinstance(event, events.Diverged):
        logger.warning("%s", _diverged(event))


def print_json(event: Event) -> None:
    """Print an event as one line of JSON on stdout; floats keep all their bits.

    A reader that has left, or a full disk behind it, never stops training.
    """
    with suppress(OSError):
        say(json.dumps(event.fields() | {"time": time.time()}))


class TextLines:
    """Logs events; batches only every so often, and none where that is infinite."""

    def __init__(self, log_every_s: float) -> None:
        self._log_every_s = log_every_s
        self._last_batch_s = 0.0
        self._total_batches = 0
        self._rate = Rate()

    def __call__(self, event: Event) -> None:
        """Log one event, or keep it for the next line."""
        if isinstance(event, events.Started):
            self._total_batches = event.total_batches
            chosen = {k: v for k, v in event.settings.items() if not v.endswith("(default)")}
            logger.info("settings: %s", ", ".join(f"{k}={v}" for k, v in chosen.items()))
        if isinstance(event, events.Batch):
            self._rate.add(event.num_samples, event.seconds)
            if time.monotonic() - self._last_batch_s < self._log_every_s:
                return
            self._last_batch_s = time.monotonic()
            logger.info("%s", self._batch(event))
            return
        level = logging.WARNING if isinstance(event, _WARNINGS) else logging.INFO
        logger.log(level, "%s", _RENDER[type(event)](event))

    def _batch(self, event: events.Batch) -> str:
        at = event.progress
        left_s = self._rate.left_s((self._total_batches - at.batch_count) * event.num_samples)
        return (
            f"epoch {at.epoch} batch {at.batch_count}/{self._total_batches} "
            f"loss {event.loss:.4f} token {event.token_accuracy:.3f} "
            f"exact {event.exact_accuracy:.3f} steps {event.mean_steps:.1f} "
            f"{self._rate.samples_per_s():.3g} samples/s, {duration(left_s)} left"
        )


def _started(event: events.Started) -> str:
    at = event.progress
    notes = "".join(f", {count:,} {name}" for name, count in event.notes.items() if count)
    origin = f"resumed from {event.source}" if event.source else "fresh start"
    return (
        f"{origin}: epoch {at.epoch}, {at.batch_count} of {event.total_batches} batches done; "
        f"{event.num_parameters:,} parameters, {event.num_samples:,} samples{notes}, "
        f"{event.world_size} worker(s)"
    )


def _evaluated(event: events.Evaluated) -> str:
    return (
        f"evaluation after batch {event.progress.batch_count}: "
        f"exact {event.exact_accuracy:.4f} token {event.token_accuracy:.4f} "
        f"mean steps {event.mean_steps:.2f} on {event.num_samples} samples "
        f"({event.seconds:.1f} s)"
    )


def _committed(event: events.Committed) -> str:
    return (
        f"checkpoint committed batch={event.progress.batch_count} names={','.join(event.names)} "
        f"bytes={event.num_bytes} seconds={event.seconds:.3f} waited={event.waited_s:.3f}"
    )


def _commit_failed(event: events.CommitFailed) -> str:
    return (
        f"checkpoint not committed ({event.error}); failures={event.num_failures} "
        f"next try in {event.retry_in_s:.0f} s; nothing is lost"
    )


def _skipped(event: events.Skipped) -> str:
    return f"batch {event.progress.batch_count} left early: not finite; samples {event.samples}"


def _diverged(event: events.Diverged) -> str:
    cause = (
        "it ran in another environment then (processor, threads or version of torch), so this "
        "run's last bits are no longer those of an undisturbed one; --cpu-capability and the same "
        "image on every node keep them"
        if event.is_other_environment
        else "nothing has changed, so a processor or its memory has failed, or trm_dist is wrong; "
        "what comes now is not to be trusted: go on from an older checkpoint on another machine"
    )
    return (
        f"batch {event.progress.batch_count} is trained again and gives the loss "
        f"{event.loss.hex()}, and gave {event.loss_before.hex()} before: {cause}"
    )


def _stopped(event: events.Stopped) -> str:
    at = event.progress
    return (
        f"stopped ({event.reason}) after epoch {at.epoch} batch {at.batch_idx}; "
        "the same command goes on from there"
    )


def _finished(event: events.Finished) -> str:
    return (
        f"finished: {event.progress.batch_count} batches, {event.progress.global_step} optimizer "
        f"steps, {duration(event.seconds)} in this start, {event.samples_per_s:.3g} samples/s, "
        f"peak memory {event.peak_memory_bytes / 2**20:.0f} MiB a worker, digest {event.digest}"
    )


_WARNINGS = (events.CommitFailed, events.Skipped, events.Diverged)
_RENDER: dict[type[Event], Callable[..., str]] = {
    events.Started: _started,
    events.Evaluated: _evaluated,
    events.Committed: _committed,
    events.CommitFailed: _commit_failed,
    events.Skipped: _skipped,
    events.Diverged: _diverged,
    events.Stopped: _stopped,
    events.Finished: _finished,
}
