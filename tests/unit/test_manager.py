"""The writer's side: what is written when, and what happens when the store refuses."""

import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes import (
    RUN,
    FailingStore,
    FakeClock,
    MemoryStore,
    make_bytes,
    make_state,
    small_archive,
)
from trm_dist.checkpoint.manager import FIRST_PAUSE_S, LONGEST_PAUSE_S, CheckpointManager
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.state import digest, from_bytes
from trm_dist.config import CheckpointConfig
from trm_dist.errors import StoreError
from trm_dist.events import CommitFailed, Committed, Event
from trm_dist.progress import Progress

ALWAYS = range(1, 10**6)


class Writer:
    """A manager with a fake clock, and what it tells."""

    def __init__(
        self,
        store: MemoryStore,
        run: Run = RUN,
        clock: FakeClock | None = None,
        **settings: Any,
    ) -> None:
        self.store = store
        self.clock = clock or FakeClock()
        self.events: list[Event] = []
        config = CheckpointConfig(**settings)
        self.manager = CheckpointManager(store, run, config, self.events.append, self.clock)

    def finish_batch(self, batch_count: int, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.manager.capture(make_state(batch_count))
        self.manager.save_if_due()

    def committed(self) -> list[list[str]]:
        return [each.names for each in self.events if isinstance(each, Committed)]

    def failed(self) -> list[CommitFailed]:
        return [each for each in self.events if isinstance(each, CommitFailed)]


def progress_at(batch_count: int) -> Progress:
    return Progress(1, batch_count, batch_count, 2 * batch_count, 4 * batch_count)


def batches(store: MemoryStore) -> dict[str, int]:
    return {name: from_bytes(data)["batch_count"] for name, data in store.files.items()}


def damage(store: MemoryStore, name: str) -> None:
    data = bytearray(store.files[name])
    data[len(data) // 2] ^= 1
    store.files[name] = bytes(data)


# -- what is written when --------------------------------------------------------------------------


def test_checkpoint_is_named_at_every_interval() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=3)

    for batch_count in range(1, 8):
        writer.finish_batch(batch_count)

    assert writer.committed() == [[epoch_name(1, 3), LATEST], [epoch_name(1, 6), LATEST]]
    assert batches(writer.store) == {epoch_name(1, 3): 3, epoch_name(1, 6): 6, LATEST: 6}


def test_checkpoint_is_named_by_its_epoch_and_batch() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=10)
    writer.manager.capture(make_state(20, epoch=3, batch_idx=4))

    writer.manager.save_if_due()

    assert writer.committed() == [[epoch_name(3, 4), LATEST]]


@pytest.mark.parametrize(("seconds", "is_due"), [(0.0, False), (59.9, False), (60.0, True)])
def test_latest_is_renewed_when_it_is_old_enough(seconds: float, is_due: bool) -> None:
    writer = Writer(MemoryStore(), latest_every_s=60)

    writer.finish_batch(1, seconds)

    assert writer.committed() == [[LATEST]] * is_due


def test_age_of_latest_is_counted_from_the_last_commit() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=2, latest_every_s=60)

    for batch_count in range(1, 7):
        writer.finish_batch(batch_count, seconds=40)

    names = [each for each in writer.committed() if each == [LATEST]]
    assert names == []  # every second batch has a name, so latest is never 60 s old


def test_latest_is_renewed_after_every_batch_on_demand() -> None:
    writer = Writer(MemoryStore(), latest_every_s=0)

    for batch_count in (1, 2, 3):
        writer.finish_batch(batch_count)

    assert writer.committed() == [[LATEST]] * 3


def test_commit_is_told_with_its_progress_and_size() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=7)

    writer.finish_batch(7)

    (event,) = writer.events
    assert isinstance(event, Committed)
    assert event.progress == progress_at(7)
    assert event.num_bytes == len(writer.store.files[LATEST])


def test_commit_is_told_with_its_duration() -> None:
    writer = Writer(MemoryStore(), clock=FakeClock(tick_s=2), checkpoint_interval=1)

    writer.finish_batch(1)

    assert writer.events[0].fields()["seconds"] == 2.0


def test_captured_state_is_written_and_not_the_live_one() -> None:
    writer, live = Writer(MemoryStore(), checkpoint_interval=1), make_state(1)
    writer.manager.capture(live)

    live["model_state_dict"]["mix.weight"].zero_()
    writer.manager.save_if_due()

    assert digest(from_bytes(writer.store.files[LATEST])) == digest(make_state(1))


def test_captured_progress_is_that_of_the_newest_capture() -> None:
    manager = Writer(MemoryStore()).manager
    assert manager.captured is None

    for batch_count in (1, 2):
        manager.capture(make_state(batch_count))

    assert manager.captured == progress_at(2)


def test_latest_that_is_newer_is_not_among_the_names() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=1)
    writer.store.put(LATEST, make_bytes(1, replace(RUN, branch=2)))

    writer.finish_batch(5)

    assert writer.committed() == [[epoch_name(1, 5)]]


# -- a store that refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", [1, 2])
def test_failed_commit_is_told_and_training_goes_on(fail_at: int) -> None:
    store = FailingStore({fail_at})
    writer = Writer(store, checkpoint_interval=1)

    writer.finish_batch(1)

    assert writer.failed() == [
        CommitFailed(
            progress=progress_at(1),
            error="[Errno 28] No space left on device",
            num_failures=1,
            retry_in_s=FIRST_PAUSE_S,
        )
    ]
    assert store.num_failures == 1


def test_failed_commit_is_not_tried_again_before_the_pause_is_over() -> None:
    store = FailingStore({1})
    writer = Writer(store, checkpoint_interval=1)

    writer.finish_batch(1)
    writer.finish_batch(2, seconds=0.9 * FIRST_PAUSE_S)

    assert batches(store) == {}


def test_failed_commit_is_tried_again_after_the_pause() -> None:
    store = FailingStore({1})
    writer = Writer(store, checkpoint_interval=100, latest_every_s=60)

    writer.finish_batch(1, seconds=60)
    writer.finish_batch(2, seconds=FIRST_PAUSE_S)

    assert batches(store) == {LATEST: 2}


def test_pauses_grow_up_to_a_limit() -> None:
    writer = Writer(FailingStore(ALWAYS), checkpoint_interval=1)

    writer.finish_batch(1)
    for batch_count in range(2, 10):
        writer.finish_batch(batch_count, seconds=writer.failed()[-1].retry_in_s)

    pauses = [each.retry_in_s for each in writer.failed()]
    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert [each.num_failures for each in writer.failed()] == list(range(1, 10))


def test_failures_are_counted_anew_after_a_commit() -> None:
    writer = Writer(FailingStore({1, 2, 5}), checkpoint_interval=1)

    for batch_count in range(1, 6):
        writer.finish_batch(batch_count, seconds=10)

    assert [each.num_failures for each in writer.failed()] == [1, 2, 1]


def test_failed_commit_leaves_the_captured_state_whole() -> None:
    store = FailingStore({1})
    writer = Writer(store, checkpoint_interval=1)

    writer.finish_batch(1)
    assert writer.manager.save_newest()

    assert digest(from_bytes(store.files[LATEST])) == digest(make_state(1))


def test_failed_commit_leaves_the_live_state_alone() -> None:
    writer, live = Writer(FailingStore(ALWAYS), checkpoint_interval=1), make_state(1)
    writer.manager.capture(live)

    writer.manager.save_if_due()

    assert digest(live) == digest(make_state(1))


def test_failed_commit_leaves_what_stood_before() -> None:
    store = FailingStore(range(3, 10**6))
    writer = Writer(store, checkpoint_interval=1)

    for batch_count in range(1, 5):
        writer.finish_batch(batch_count, seconds=10)

    assert batches(store) == {epoch_name(1, 1): 1, LATEST: 1}


def test_training_stops_when_no_commit_works_until_the_deadline() -> None:
    writer = Writer(FailingStore(ALWAYS), checkpoint_interval=1, store_deadline=100)
    writer.finish_batch(1)
    writer.finish_batch(2, seconds=99)

    with pytest.raises(StoreError, match=r"No space left.*--store-deadline") as caught:
        writer.finish_batch(3, seconds=60)

    assert str(caught.value).startswith("memory://checkpoints: no checkpoint could be written")


def test_deadline_is_counted_from_the_first_failure() -> None:
    writer = Writer(FailingStore({1, 2}), checkpoint_interval=1, store_deadline=100)

    writer.finish_batch(1, seconds=10_000)
    writer.finish_batch(2, seconds=99)
    writer.finish_batch(3, seconds=10_000)

    assert writer.committed() == [[epoch_name(1, 3), LATEST]]


def test_deadline_of_zero_allows_no_failure() -> None:
    writer = Writer(FailingStore({1}), checkpoint_interval=1, store_deadline=0)

    with pytest.raises(StoreError):
        writer.finish_batch(1)


# -- on a stop -------------------------------------------------------------------------------------


def test_save_newest_writes_the_captured_state_as_latest() -> None:
    writer = Writer(MemoryStore())
    writer.finish_batch(1)

    assert writer.manager.save_newest()

    assert writer.committed() == [[LATEST]]
    assert batches(writer.store) == {LATEST: 1}


def test_save_newest_writes_a_state_once() -> None:
    writer = Writer(MemoryStore())
    writer.finish_batch(1)

    assert [writer.manager.save_newest() for _ in range(3)] == [True] * 3

    assert writer.committed() == [[LATEST]]


def test_save_newest_writes_nothing_before_the_first_capture() -> None:
    writer = Writer(MemoryStore())

    assert writer.manager.save_newest()

    assert writer.store.calls == []


def test_save_newest_writes_nothing_that_is_committed_by_name() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=1)
    writer.finish_batch(1)
    writer.store.calls.clear()

    assert writer.manager.save_newest()

    assert writer.store.calls == []


def test_save_newest_leaves_the_file_alone_from_which_this_start_began() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=5)
    writer.manager.capture(make_state(5))

    assert writer.manager.save_newest()

    assert set(writer.store.files) == {LATEST}


def test_save_newest_gives_a_boundary_of_the_interval_its_own_name() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=5)
    writer.manager.capture(make_state(4))
    writer.manager.capture(make_state(5))

    assert writer.manager.save_newest()

    assert set(writer.store.files) == {LATEST, epoch_name(1, 5)}


def test_save_newest_says_when_it_failed() -> None:
    store = FailingStore({1})
    writer = Writer(store)
    writer.finish_batch(1)

    assert [writer.manager.save_newest() for _ in range(2)] == [False, True]

    assert batches(store) == {LATEST: 1}


def test_save_newest_serves_another_thread() -> None:
    writer = Writer(MemoryStore())
    writer.finish_batch(1)

    thread = threading.Thread(target=writer.manager.save_newest)
    thread.start()
    thread.join()

    assert batches(writer.store) == {LATEST: 1}


# -- at the end ------------------------------------------------------------------------------------


def test_save_final_writes_final_and_latest() -> None:
    writer = Writer(MemoryStore())
    writer.finish_batch(9)

    writer.manager.save_final()

    assert writer.committed() == [[FINAL, LATEST]]
    assert batches(writer.store) == {FINAL: 9, LATEST: 9}


def test_save_final_writes_a_state_that_is_committed_already() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=9)
    writer.finish_batch(9)

    writer.manager.save_final()

    assert batches(writer.store) == {epoch_name(1, 9): 9, FINAL: 9, LATEST: 9}


def test_save_final_tries_until_it_works() -> None:
    store = FailingStore({1, 2, 4})
    writer = Writer(store, clock=FakeClock(tick_s=100))  # no pause is left when it looks
    writer.manager.capture(make_state(9))

    writer.manager.save_final()

    assert [each.num_failures for each in writer.failed()] == [1, 2, 3]
    assert batches(store) == {FINAL: 9, LATEST: 9}


def test_save_final_gives_up_after_the_deadline() -> None:
    clock = FakeClock(tick_s=100)
    writer = Writer(FailingStore(ALWAYS), clock=clock, store_deadline=1000)
    writer.manager.capture(make_state(9))

    with pytest.raises(StoreError):
        writer.manager.save_final()


# -- retention -------------------------------------------------------------------------------------


def test_retention_keeps_all_by_default() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=1)

    for batch_count in range(1, 6):
        writer.finish_batch(batch_count)

    assert len(writer.store.files) == 6


def test_retention_keeps_the_last_and_every_nth() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=1, keep_last=2, keep_every=4)

    for batch_count in range(1, 12):
        writer.finish_batch(batch_count)

    kept = {epoch_name(1, count): count for count in (4, 8, 10, 11)}
    assert batches(writer.store) == kept | {LATEST: 11}


def test_retention_keeps_the_newest_although_latest_holds_it() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=1, keep_last=1)

    for batch_count in (9, 10, 11):
        writer.finish_batch(batch_count)

    assert batches(writer.store) == {epoch_name(1, 11): 11, LATEST: 11}


def test_retention_keeps_final() -> None:
    writer = Writer(MemoryStore(), checkpoint_interval=1, keep_last=1)
    writer.finish_batch(1)
    writer.manager.save_final()

    for batch_count in (2, 3):
        writer.finish_batch(batch_count)

    assert batches(writer.store) == {epoch_name(1, 3): 3, FINAL: 1, LATEST: 3}


def test_retention_does_not_count_damaged_files() -> None:
    store = MemoryStore()
    for batch_count in (1, 2, 3):
        store.put(epoch_name(1, batch_count), make_bytes(batch_count))
    for batch_count in (2, 3):
        damage(store, epoch_name(1, batch_count))

    Writer(store, checkpoint_interval=1, keep_last=2).finish_batch(4)

    assert set(store.files) == {epoch_name(1, count) for count in (1, 2, 3, 4)} | {LATEST}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"torn",
        bytes(10_000),
        small_archive({}),
        make_bytes(9).replace(b'"branch"', b'"brinch"'),
    ],
)
def test_retention_does_not_count_files_without_a_seal(content: bytes) -> None:
    store = MemoryStore()
    store.put(epoch_name(9, 9), content)
    writer = Writer(store, checkpoint_interval=1, keep_last=1)

    for batch_count in (1, 2):
        writer.finish_batch(batch_count)

    assert set(store.files) == {epoch_name(9, 9), epoch_name(1, 2), LATEST}


@pytest.mark.parametrize("other", [{"branch": 2}, {"run_id": "run-2"}, {"branch": 0}])
def test_retention_leaves_files_of_others_alone(other: dict[str, Any]) -> None:
    store, names = MemoryStore(), [epoch_name(1, count) for count in (50, 60, 70)]
    for name, batch_count in zip(names, (50, 60, 70), strict=True):
        store.put(name, make_bytes(batch_count, replace(RUN, **other)))
    writer = Writer(store, checkpoint_interval=1, keep_last=1)

    for batch_count in (1, 2):
        writer.finish_batch(batch_count)

    assert set(store.files) == {*names, epoch_name(1, 2), LATEST}


def test_retention_leaves_foreign_files_alone() -> None:
    store = MemoryStore()
    store.put("model.pt", make_bytes(1))
    writer = Writer(store, checkpoint_interval=1, keep_last=1)

    for batch_count in (2, 3):
        writer.finish_batch(batch_count)

    assert set(store.files) == {"model.pt", epoch_name(1, 3), LATEST}


def test_retention_happens_after_a_commit_only() -> None:
    store = FailingStore({1})
    for batch_count in (1, 2, 3):
        store.files[epoch_name(1, batch_count)] = make_bytes(batch_count)

    Writer(store, checkpoint_interval=1, keep_last=1).finish_batch(4)

    assert len(store.files) == 3


class UndeletableStore(MemoryStore):
    """A store that refuses to delete."""

    def delete(self, name: str) -> None:
        raise PermissionError(name)


def test_trouble_with_retention_does_not_stop_training() -> None:
    writer = Writer(UndeletableStore(), checkpoint_interval=1, keep_last=1)

    for batch_count in (1, 2, 3):
        writer.finish_batch(batch_count)

    assert batches(writer.store)[LATEST] == 3
    assert writer.failed() == []
