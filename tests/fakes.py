"""Doubles written by hand. Importing this needs no torch; only `make_state` does, when called."""

import errno
import io
import json
import os
import zipfile
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict
from typing import Any

from trm_dist.checkpoint.archive import KIND
from trm_dist.checkpoint.memory import Held, Slots
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.seal import seal
from trm_dist.checkpoint.store import Entry, Guard, unguarded
from trm_dist.checkpoint.writer import Writer

RUN = Run(run_id="run-1", branch=1, origin="", created_at=1000.0, launch_id="launch-1")


class MemoryStore:
    """A store in a dict, which remembers what it was asked to change."""

    def __init__(self, url: str = "memory://checkpoints") -> None:
        self.url = self.identity = url
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        """Such as "put checkpoint_latest.pt"."""

    def entries(self, folder: str = "") -> list[Entry]:
        start = f"{folder}/" if folder else ""
        return [
            Entry(name.removeprefix(start), len(data), 0.0)
            for name, data in self.files.items()
            if name.startswith(start) and "/" not in name.removeprefix(start)
        ]

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        data = self._existing(name)[start:]
        return data if num_bytes is None else data[:num_bytes]

    def view(self, name: str) -> memoryview:
        return memoryview(bytearray(self.read(name)))

    def put(
        self, name: str, pieces: Sequence[bytes | memoryview], guard: Guard = unguarded
    ) -> None:
        guard()
        self.calls.append(f"put {name}")
        self.files[name] = b"".join(pieces)

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        if self.files.get(name) != expected:
            return False
        self.put(name, [data])
        return True

    def copy(self, source: str, target: str, guard: Guard = unguarded) -> None:
        content = self._existing(source)
        guard()
        self.calls.append(f"copy {source} {target}")
        self.files[target] = content

    def delete(self, name: str) -> None:
        self.calls.append(f"delete {name}")
        self.files.pop(name, None)

    def leftovers(self) -> list[str]:
        return []

    def remove_leftovers(self) -> None:
        pass

    def check_writable(self) -> None:
        pass

    def free_bytes(self) -> int | None:
        return None

    def _existing(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self.files[name]


class FailingStore(MemoryStore):
    """A store that is full whenever the number of a put or copy, from 1, is in `fail_at`."""

    def __init__(self, fail_at: Container[int]) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.num_failures = 0
        self._num_writes = 0

    def put(
        self, name: str, pieces: Sequence[bytes | memoryview], guard: Guard = unguarded
    ) -> None:
        self._fail_if_it_is_time()
        super().put(name, pieces, guard)

    def copy(self, source: str, target: str, guard: Guard = unguarded) -> None:
        self._fail_if_it_is_time()
        super().copy(source, target, guard)

    def _fail_if_it_is_time(self) -> None:
        self._num_writes += 1
        if self._num_writes in self.fail_at:
            self.num_failures += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class InlinePersister:
    """Publishes in this process, at once, and again whenever it is asked for events in time."""

    def __init__(self, writer: Writer, slots: Slots, clock: Callable[[], float]) -> None:
        self._writer, self._slots, self._clock = writer, slots, clock
        self._events: list[dict[str, Any]] = []
        self._jobs: list[tuple[int, int, list[str]]] = []
        self._retry_at_s = 0.0
        self.asked: list[tuple[int, int, list[str], bool]] = []
        self.is_closed = False
        self.num_kept = 0
        self.is_hung = False
        """While set, nothing is published and nothing is told."""

    def publish(
        self, slot: int, sequence: int, names: list[str], *, is_urgent: bool = False
    ) -> None:
        self.asked.append((slot, sequence, names, is_urgent))
        self._jobs.append((slot, sequence, names))
        self._work()

    def events(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        if not self._events and self._clock() >= self._retry_at_s:
            self._work()
        found, self._events = self._events, []
        return found

    def keep_journal(self, wait_s: float) -> None:
        self.num_kept += 1

    def close(self) -> None:
        self.is_closed = True

    def _work(self) -> None:
        while self._jobs and not self.is_hung:
            slot, sequence, names = self._jobs[0]
            held = self._slots.read(slot)
            assert held is not None, "a slot that is published stays whole"
            assert held.sequence == sequence, "and is not written again"
            job = {"slot": slot, "sequence": sequence}
            try:
                commit = self._writer.commit(held, names)
            except OSError as error:
                self._retry_at_s = self._clock() + 1
                told = {"error": str(error), "num_failures": 1, "retry_in_s": 1.0}
                self._events.append(job | {"is": "failed"} | told)
                return
            self._jobs.pop(0)
            self._events.append(job | {"is": "committed"} | asdict(commit))


class FakeClock:
    """A clock that moves when told to, and by `tick_s` each time somebody looks."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.now_s = 1000.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def make_summary(batch_count: int = 1, run: Run = RUN) -> dict[str, Any]:
    """Return what the seal of a checkpoint says."""
    told = {name: value for name, value in run.summary().items() if name != "generation"}
    return told | _counters(batch_count)


def small_archive(summary: dict[str, Any], content: bytes = b"") -> bytes:
    """Return a sealed zip that is no checkpoint; sealing and publishing do not look inside."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("content", content or repr(summary).encode())
    return b"".join(seal([stream.getvalue()], summary))


def snapshot_of(summary: dict[str, Any]) -> Held:
    """Return a snapshot without tensors, made without torch."""
    run = {name: value for name, value in summary.items() if name not in _counters(0)}
    tree = {name: value for name, value in summary.items() if name in _counters(0)}
    items = [*tree.items(), ("run", {KIND: "dict", "items": [*run.items()]})]
    header = {"tree": {KIND: "dict", "items": items}, "tensors": []}
    return Held(0, 1, json.dumps(header).encode(), memoryview(b""), owner=None)  # type: ignore


def make_state(batch_count: int = 1, run: Run = RUN, **changes: Any) -> dict[str, Any]:
    """Return a small valid checkpoint state; its tensors depend on `batch_count` and the branch."""
    import torch

    generator = torch.Generator().manual_seed(1000 * run.branch + batch_count)
    shapes = {"embed.weight": (11, 8), "mix.weight": (8, 8), "head.bias": (5,)}

    def weights() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    moments = {
        number: {
            "step": torch.tensor(2.0 * batch_count),
            "exp_avg": torch.randn(shape, generator=generator),
            "exp_avg_sq": torch.rand(shape, generator=generator),
        }
        for number, shape in enumerate(shapes.values())
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.95), "fused": True, "params": [0, 1, 2]}
    return _counters(batch_count) | {
        "model_state_dict": weights(),
        "optimizer_state_dict": {"state": moments, "param_groups": [group]},
        "scheduler_state_dict": {"name": "warmup-constant", "last_step": 2 * batch_count},
        "ema_state_dict": {"decay": 0.999, "num_updates": batch_count, "weights": weights()},
        "rng_state": {"seed": 0, "algorithm": "blake2b-key/splitmix64-counter", "version": 1},
        "config": {"dim": 8, "lr": 1e-4, "dataset": "sudoku4:train"},
        "dataset": {"url": "sudoku4:train", "sha256": "0" * 64, "num_samples": 4, "num_tokens": 5},
        "world": {"world_size": 1, "num_nodes": 1, "shards": 1},
        "run": run.summary() | {"generation": 1, "torch": "2.13.0", "environment": {}},
    } | changes  # fmt: skip


def make_bytes(batch_count: int = 1, run: Run = RUN, **changes: Any) -> bytes:
    """Return a sealed checkpoint of `make_state`."""
    return to_bytes(make_state(batch_count, run, **changes))[0]


def to_bytes(
    state: dict[str, Any], summary: dict[str, Any] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Return a state as a sealed checkpoint, and the summary in its seal."""
    from trm_dist.checkpoint.archive import encode
    from trm_dist.checkpoint.snapshot import Flat

    flat = Flat(state)
    buffer = memoryview(bytearray(flat.num_bytes))
    flat.copy_to(buffer)
    pieces, summary = encode(flat.header, buffer, summary)
    return b"".join(pieces), summary


def torch_saved(content: Any, summary: dict[str, Any]) -> bytes:
    """Return anything as torch.save writes it, sealed."""
    import torch

    stream = io.BytesIO()
    torch.save(content, stream)
    return b"".join(seal([stream.getvalue()], summary))


def _counters(batch_count: int) -> dict[str, int]:
    return {
        "epoch": 1,
        "batch_idx": batch_count,
        "batch_count": batch_count,
        "global_step": 2 * batch_count,
        "samples_seen": 4 * batch_count,
        "format_version": 1,
    }
