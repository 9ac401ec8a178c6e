"""Publishing: the own name first, then latest, which never goes backwards."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes import RUN, FailingStore, MemoryStore, make_summary, small_archive
from trm_dist.checkpoint.catalog import read_summary, read_tail
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name
from trm_dist.checkpoint.publish import publish
from trm_dist.checkpoint.seal import Piece, verify_seal
from trm_dist.checkpoint.store import Guard, Store, unguarded
from trm_dist.errors import CorruptCheckpointError


class ForgetfulStore(MemoryStore):
    """A store in which a file is removed by hand right after it was put."""

    def __init__(self, removed: str) -> None:
        super().__init__()
        self._removed = removed

    def put(self, name: str, pieces: Sequence[Piece], guard: Guard = unguarded) -> None:
        super().put(name, pieces, guard)
        if name == self._removed:
            self.delete(name)


def publish_batch(store: Store, batch_count: int, *own_names: str, **run: Any) -> list[str]:
    summary = make_summary(batch_count, replace(RUN, **run))
    return publish(store, [small_archive(summary)], own_names=own_names, summary=summary)


def batches(store: MemoryStore) -> dict[str, int]:
    """Return the batch count that every file really holds."""
    return {name: verify_seal(data).summary["batch_count"] for name, data in store.files.items()}


def test_publish_without_an_own_name_renews_latest() -> None:
    store = MemoryStore()

    names = publish_batch(store, 7)

    assert names == [LATEST]
    assert batches(store) == {LATEST: 7}


def test_publish_writes_the_own_name_before_latest() -> None:
    store = MemoryStore()

    names = publish_batch(store, 7, epoch_name(1, 7))

    assert names == [epoch_name(1, 7), LATEST]
    assert store.calls == [f"put {epoch_name(1, 7)}", f"copy {epoch_name(1, 7)} {LATEST}"]


def test_publish_uploads_once_for_several_names() -> None:
    store = MemoryStore()

    publish_batch(store, 7, epoch_name(1, 7), FINAL)

    assert [call.split()[0] for call in store.calls] == ["put", "copy", "copy"]
    assert batches(store) == {epoch_name(1, 7): 7, FINAL: 7, LATEST: 7}


@pytest.mark.parametrize(
    ("stored", "ours", "is_renewed"),
    [
        ((1, 5), (1, 6), True),
        ((1, 5), (1, 5), True),
        ((1, 5), (1, 4), False),
        ((1, 9), (1, 10), True),
        ((1, 500), (2, 1), True),
        ((2, 1), (1, 500), False),
        ((2, 5), (2, 4), False),
        ((9, 1), (10, 1), True),
    ],
)
def test_latest_never_goes_backwards_within_a_run(
    stored: tuple[int, int], ours: tuple[int, int], is_renewed: bool
) -> None:
    store = MemoryStore()
    publish_batch(store, stored[1], branch=stored[0])

    names = publish_batch(store, ours[1], FINAL, branch=ours[0])

    assert names == [FINAL, LATEST][: 1 + is_renewed]
    assert batches(store)[LATEST] == (ours if is_renewed else stored)[1]


@pytest.mark.parametrize("branch", [1, 2])
def test_latest_of_another_run_is_replaced(branch: int) -> None:
    store = MemoryStore()
    publish_batch(store, 500, branch=branch)

    names = publish_batch(store, 1, run_id="run-2")

    assert names == [LATEST]
    assert batches(store) == {LATEST: 1}


@pytest.mark.parametrize("damaged", [b"", b"torn", bytes(10_000)])
def test_latest_without_a_seal_is_replaced(damaged: bytes) -> None:
    store = MemoryStore()
    store.put(LATEST, [damaged])

    names = publish_batch(store, 1)

    assert names == [LATEST]
    assert batches(store) == {LATEST: 1}


@pytest.mark.parametrize("key", ["run_id", "branch", "batch_count"])
def test_latest_with_a_broken_seal_is_replaced(key: str) -> None:
    store, summary = MemoryStore(), make_summary(7)
    del summary[key]
    store.put(LATEST, [small_archive(summary)])

    names = publish_batch(store, 1)

    assert names == [LATEST]
    assert batches(store) == {LATEST: 1}


def test_latest_is_written_although_the_own_file_was_deleted_meanwhile() -> None:
    store = ForgetfulStore(removed=epoch_name(1, 7))

    names = publish_batch(store, 7, epoch_name(1, 7))

    assert LATEST in names
    assert batches(store) == {LATEST: 7}


@pytest.mark.parametrize("fail_at", [1, 2])
def test_failed_publish_leaves_what_stood_before(fail_at: int) -> None:
    store = FailingStore({1 + fail_at})
    publish_batch(store, 6)

    with pytest.raises(OSError, match="No space left"):
        publish_batch(store, 7, epoch_name(1, 7))

    assert batches(store)[LATEST] == 6
    assert store.num_failures == 1


def test_publish_works_again_after_a_failure() -> None:
    store = FailingStore({2})
    with pytest.raises(OSError, match="No space left"):
        publish_batch(store, 6, epoch_name(1, 6))

    publish_batch(store, 7)

    assert batches(store) == {epoch_name(1, 6): 6, LATEST: 7}


@pytest.mark.parametrize("num_bytes", [1, 100, 20_000])
def test_read_tail_gives_the_seal(num_bytes: int) -> None:
    store = MemoryStore()
    data = small_archive(make_summary(7), bytes(num_bytes))
    store.put(LATEST, [data])

    assert read_tail(store, LATEST) == verify_seal(data)


def test_read_tail_of_a_missing_file_raises() -> None:
    with pytest.raises(FileNotFoundError):
        read_tail(MemoryStore(), LATEST)


@pytest.mark.parametrize("damaged", [b"", b"torn", bytes(10_000)])
def test_read_tail_of_a_file_without_a_seal_raises(damaged: bytes) -> None:
    store = MemoryStore()
    store.put(LATEST, [damaged])

    with pytest.raises(CorruptCheckpointError):
        read_tail(store, LATEST)


@pytest.mark.parametrize("damaged", [None, b"", b"torn"])
def test_read_summary_is_none_where_nothing_is_known(damaged: bytes | None) -> None:
    store = MemoryStore()
    if damaged is not None:
        store.put(LATEST, [damaged])

    assert read_summary(store, LATEST) is None


def test_damaged_latest_that_claims_the_future_is_replaced() -> None:
    store = MemoryStore()
    publish_batch(store, 1)
    data = bytearray(store.read(LATEST))
    data[bytes(data).rfind(b'"batch_count": 1') + 15] ^= 8  # 1 becomes 9
    store.put(LATEST, [bytes(data)])
    assert (read_summary(store, LATEST) or {})["batch_count"] == 9

    assert publish_batch(store, 2) == [LATEST]
