"""The writer's side: what is written when, and what happens when the store refuses."""

import json
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes import (
    RUN,
    FailingStore,
    FakeClock,
    InlinePersister,
    MemoryStore,
    make_bytes,
    make_state,
    small_archive,
)
from trm_dist.checkpoint.archive import plain
from trm_dist.checkpoint.manager import CheckpointManager, Inherited, Snapshots, overdue
from trm_dist.checkpoint.memory import private_slots
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name
from trm_dist.checkpoint.runs import Run
from trm_dist.checkpoint.state import digest, from_bytes
from trm_dist.checkpoint.writer import Writer
from trm_dist.config import CheckpointConfig
from trm_dist.errors import StoreError
from trm_dist.events import CommitFailed, Committed, Event
from trm_dist.progress import Progress

ALWAYS = range(1, 10**6)


class Training:
    """A manager with a fake clock and real slots, and what it tells."""

    def __init__(
        self,
        store: MemoryStore,
        run: Run = RUN,
        clock: FakeClock | None = None,
        num_slots: int = 3,
        inherited: Inherited | None = None,
        **settings: Any,
    ) -> None:
        self.store = store
        self.clock = clock or FakeClock()
        self.events: list[Event] = []
        config = CheckpointConfig(checkpoint_dir=store.url, **settings)
        self.slots = private_slots(num_slots=num_slots, header_bytes=10_000, body_bytes=10_000)
        writer = Writer(store, run, keep_last=config.keep_last, keep_every=config.keep_every)
        self.persister = InlinePersister(writer, self.slots, self.clock)
        self.manager = CheckpointManager(
            Snapshots(self.slots), self.persister, config, self.events.append, inherited, self.clock
        )

    def finish_batch(self, batch_count: int, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.manager.capture(make_state(batch_count))
        self.manager.save_if_due()
        self.manager.listen()

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
    writer = Training(MemoryStore(), checkpoint_interval=3)

    for batch_count in range(1, 8):
        writer.finish_batch(batch_count)

    assert writer.committed() == [[epoch_name(1, 3), LATEST], [epoch_name(1, 6), LATEST]]
    assert batches(writer.store) == {epoch_name(1, 3): 3, epoch_name(1, 6): 6, LATEST: 6}


def test_checkpoint_is_named_by_its_epoch_and_batch() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=10)
    writer.manager.capture(make_state(20, epoch=3, batch_idx=4))

    writer.manager.save_if_due()
    writer.manager.listen()

    assert writer.committed() == [[epoch_name(3, 4), LATEST]]


@pytest.mark.parametrize(("seconds", "is_due"), [(0.0, False), (59.9, False), (60.0, True)])
def test_latest_is_renewed_when_it_is_old_enough(seconds: float, is_due: bool) -> None:
    writer = Training(MemoryStore(), latest_every_s=60)

    writer.finish_batch(1, seconds)

    assert writer.committed() == [[LATEST]] * is_due


def test_age_of_latest_is_counted_from_the_last_commit() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=2, latest_every_s=60)

    for batch_count in range(1, 7):
        writer.finish_batch(batch_count, seconds=40)

    names = [each for each in writer.committed() if each == [LATEST]]
    assert names == []  # every second batch has a name, so latest is never 60 s old


def test_latest_is_renewed_after_every_batch_on_demand() -> None:
    writer = Training(MemoryStore(), latest_every_s=0)

    for batch_count in (1, 2, 3):
        writer.finish_batch(batch_count)

    assert writer.committed() == [[LATEST]] * 3


def test_commit_is_told_with_its_progress_and_size() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=7)

    writer.finish_batch(7)

    (event,) = writer.events
    assert isinstance(event, Committed)
    assert event.progress == progress_at(7)
    assert event.num_bytes == len(writer.store.files[LATEST])


def test_captured_state_is_written_and_not_the_live_one() -> None:
    writer, live = Training(MemoryStore(), checkpoint_interval=1), make_state(1)
    writer.manager.capture(live)

    live["model_state_dict"]["mix.weight"].zero_()
    writer.manager.save_if_due()
    writer.manager.listen()

    assert digest(from_bytes(writer.store.files[LATEST])) == digest(make_state(1))


def test_captured_progress_is_that_of_the_newest_capture() -> None:
    manager = Training(MemoryStore()).manager
    assert manager.captured is None

    for batch_count in (1, 2):
        manager.capture(make_state(batch_count))

    assert manager.captured == progress_at(2)


def test_latest_that_is_newer_is_not_among_the_names() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=1)
    writer.store.put(LATEST, [make_bytes(1, replace(RUN, branch=2))])

    writer.finish_batch(5)

    assert writer.committed() == [[epoch_name(1, 5)]]


# -- a store that refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", [1, 2])
def test_failed_commit_is_told_and_training_goes_on(fail_at: int) -> None:
    writer = Training(FailingStore({fail_at}), checkpoint_interval=3)

    for batch_count in (3, 4, 5):
        writer.finish_batch(batch_count)

    (failed,) = writer.failed()
    assert failed.progress == progress_at(3)
    assert failed.error == "[Errno 28] No space left on device"
    assert writer.manager.captured == progress_at(5)


def test_failed_commit_is_published_under_its_own_name_later() -> None:
    writer = Training(FailingStore({1}), checkpoint_interval=3)

    for batch_count in (3, 4, 5):
        writer.finish_batch(batch_count, seconds=1)

    assert batches(writer.store) == {epoch_name(1, 3): 3, LATEST: 3}


def test_next_checkpoint_with_a_name_waits_for_the_one_before_and_says_how_long() -> None:
    writer = Training(FailingStore({1}), clock=FakeClock(tick_s=0.3), checkpoint_interval=1)

    writer.finish_batch(1)
    writer.finish_batch(2)

    assert batches(writer.store) == {epoch_name(1, 1): 1, epoch_name(1, 2): 2, LATEST: 2}
    waits = [each.waited_s for each in writer.events if isinstance(each, Committed)]
    assert sum(waits) >= 1


def test_latest_alone_is_not_asked_for_while_a_publish_is_in_flight() -> None:
    writer = Training(MemoryStore(), latest_every_s=10)
    writer.persister.is_hung = True

    for batch_count in range(1, 9):
        writer.finish_batch(batch_count, seconds=10)

    assert len(writer.persister.asked) == 1


def test_slot_that_is_published_is_never_written_and_the_newest_always_stands() -> None:
    writer = Training(MemoryStore(), latest_every_s=0)
    writer.persister.is_hung = True

    for batch_count in range(1, 9):
        writer.finish_batch(batch_count)
        newest = writer.slots.newest()
        assert newest is not None
        assert plain(json.loads(newest.header)["tree"])["batch_count"] == batch_count

    writer.persister.is_hung = False
    writer.manager.listen()
    assert batches(writer.store) == {LATEST: 1}


def test_capture_waits_when_all_slots_are_being_published() -> None:
    busy = [{"slot": slot, "sequence": slot + 1} for slot in range(2)]
    writer = Training(MemoryStore(), num_slots=2, inherited=Inherited(busy), store_deadline=5)
    writer.clock.tick_s = 1

    with pytest.raises(StoreError):
        writer.finish_batch(1)

    assert writer.manager.captured is None


@pytest.mark.parametrize("is_hung", [False, True])
def test_training_stops_when_no_commit_works_until_the_deadline(is_hung: bool) -> None:
    writer = Training(FailingStore(ALWAYS), checkpoint_interval=5, store_deadline=100)
    writer.persister.is_hung = is_hung
    writer.finish_batch(5)
    writer.finish_batch(6, seconds=99)

    with pytest.raises(StoreError, match="--store-deadline") as caught:
        writer.finish_batch(7, seconds=1)

    message = str(caught.value)
    assert message.startswith("memory://checkpoints: no checkpoint could be written for 100 s")
    assert ("no answer yet" if is_hung else "No space left") in message


def test_deadline_is_counted_from_the_publish_that_fails() -> None:
    writer = Training(FailingStore({1, 2}), checkpoint_interval=5, store_deadline=100)

    writer.finish_batch(5, seconds=10_000)
    writer.finish_batch(6, seconds=98)
    writer.finish_batch(7, seconds=1)
    writer.finish_batch(10, seconds=10_000)

    assert writer.committed() == [[epoch_name(1, 5), LATEST], [epoch_name(1, 10), LATEST]]


def test_failed_commit_leaves_the_live_state_alone() -> None:
    writer, live = Training(FailingStore(ALWAYS), checkpoint_interval=1), make_state(1)
    writer.manager.capture(live)

    writer.manager.save_if_due()

    assert digest(live) == digest(make_state(1))


# -- on a stop -------------------------------------------------------------------------------------


def test_save_newest_writes_the_captured_state_as_latest() -> None:
    writer = Training(MemoryStore())
    writer.finish_batch(1)

    assert writer.manager.save_newest(1.0)

    assert writer.committed() == [[LATEST]]
    assert batches(writer.store) == {LATEST: 1}


def test_save_newest_writes_a_state_once() -> None:
    writer = Training(MemoryStore())
    writer.finish_batch(1)

    assert [writer.manager.save_newest(1.0) for _ in range(3)] == [True] * 3

    assert writer.committed() == [[LATEST]]


def test_save_newest_writes_nothing_before_the_first_capture() -> None:
    writer = Training(MemoryStore())

    assert writer.manager.save_newest(1.0)

    assert writer.store.calls == []


def test_save_newest_writes_nothing_that_is_committed_by_name() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=1)
    writer.finish_batch(1)
    writer.store.calls.clear()

    assert writer.manager.save_newest(1.0)

    assert writer.store.calls == []


def test_save_newest_leaves_the_file_alone_from_which_this_start_began() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=5)
    writer.manager.capture(make_state(5))

    assert writer.manager.save_newest(1.0)

    assert set(writer.store.files) == {LATEST}


def test_save_newest_gives_a_boundary_of_the_interval_its_own_name() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=5)
    writer.manager.capture(make_state(4))
    writer.manager.capture(make_state(5))

    assert writer.manager.save_newest(1.0)

    assert set(writer.store.files) == {LATEST, epoch_name(1, 5)}


def test_save_newest_says_when_it_failed() -> None:
    writer = Training(FailingStore({1}), clock=FakeClock(tick_s=0.4))
    writer.manager.capture(make_state(1))

    assert [writer.manager.save_newest(0.5), writer.manager.save_newest(5.0)] == [False, True]

    assert batches(writer.store) == {LATEST: 1}


def test_save_newest_is_urgent_and_does_not_wait_for_the_one_before() -> None:
    writer = Training(MemoryStore(), clock=FakeClock(tick_s=0.5), checkpoint_interval=2)
    writer.persister.is_hung = True
    writer.finish_batch(2)
    writer.finish_batch(3)

    assert not writer.manager.save_newest(2.0)

    assert [(names, is_urgent) for *_, names, is_urgent in writer.persister.asked] == [
        ([epoch_name(1, 2)], False),
        ([], True),
    ]


def test_save_newest_gives_what_was_left_unnamed_its_name() -> None:
    inherited = Inherited(has_name=False)
    writer = Training(MemoryStore(), inherited=inherited, checkpoint_interval=5)
    writer.manager.capture(make_state(5))

    assert writer.manager.save_newest(1.0)

    assert set(writer.store.files) == {LATEST, epoch_name(1, 5)}


def test_state_before_the_first_batch_has_no_name_of_its_own() -> None:
    writer = Training(MemoryStore(), inherited=Inherited(has_name=False), checkpoint_interval=5)
    writer.manager.capture(make_state(0))

    assert writer.manager.save_newest(1.0)

    assert set(writer.store.files) == {LATEST}


def test_stop_saves_while_the_training_thread_waits_for_the_store() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=1)
    writer.persister.is_hung = True
    writer.finish_batch(1)
    training = threading.Thread(target=writer.finish_batch, args=(2,), daemon=True)
    training.start()
    while writer.manager.captured != progress_at(2):
        time.sleep(0.01)

    writer.manager.freeze(10.0)
    writer.persister.is_hung = False
    assert writer.manager.save_newest(1.0)

    assert batches(writer.store)[LATEST] == 2
    assert training.is_alive()  # it waits for the end of the process


def test_frozen_manager_captures_no_more() -> None:
    writer = Training(MemoryStore())
    writer.finish_batch(1)
    frozen = threading.Event()

    def stop() -> None:  # its thread lives until the process ends
        writer.manager.freeze(10.0)
        frozen.set()
        threading.Event().wait()

    threading.Thread(target=stop, daemon=True).start()
    frozen.wait()
    training = threading.Thread(target=writer.finish_batch, args=(2,), daemon=True)
    training.start()
    training.join(0.3)

    assert training.is_alive()
    assert writer.manager.captured == progress_at(1)


def test_end_does_not_wait_for_a_journal_while_another_thread_waits_for_its_persister() -> None:
    writer = Training(MemoryStore())
    has_lock, is_over = threading.Event(), threading.Event()

    def start_persister() -> None:  # which takes as long as it takes
        with writer.manager._lock:
            has_lock.set()
            is_over.wait()

    threading.Thread(target=start_persister, daemon=True).start()
    has_lock.wait()
    writer.manager.keep_journal(0.01)
    assert writer.persister.num_kept == 0
    is_over.set()

    writer.manager.keep_journal(10.0)
    assert writer.persister.num_kept == 1


def test_save_newest_serves_another_thread() -> None:
    writer = Training(MemoryStore())
    writer.finish_batch(1)

    thread = threading.Thread(target=writer.manager.save_newest, args=(1.0,))
    thread.start()
    thread.join()

    assert batches(writer.store) == {LATEST: 1}


# -- at the end ------------------------------------------------------------------------------------


def test_save_final_writes_final_and_latest() -> None:
    writer = Training(MemoryStore())
    writer.finish_batch(9)

    writer.manager.save_final()

    assert writer.committed() == [[FINAL, LATEST]]
    assert batches(writer.store) == {FINAL: 9, LATEST: 9}


def test_save_final_writes_a_state_that_is_committed_already() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=9)
    writer.finish_batch(9)

    writer.manager.save_final()

    assert batches(writer.store) == {epoch_name(1, 9): 9, FINAL: 9, LATEST: 9}


def test_save_final_tries_until_it_works() -> None:
    store = FailingStore({1, 2, 4})
    writer = Training(store, clock=FakeClock(tick_s=100))  # no pause is left when it looks
    writer.manager.capture(make_state(9))

    writer.manager.save_final()

    assert len(writer.failed()) == 3
    assert batches(store) == {FINAL: 9, LATEST: 9}


def test_save_final_gives_up_after_the_deadline() -> None:
    clock = FakeClock(tick_s=100)
    writer = Training(FailingStore(ALWAYS), clock=clock, store_deadline=1000)
    writer.manager.capture(make_state(9))

    with pytest.raises(StoreError):
        writer.manager.save_final()


def test_close_lets_the_persister_end() -> None:
    writer = Training(MemoryStore())

    writer.manager.close()

    assert writer.persister.is_closed


# -- retention -------------------------------------------------------------------------------------


def test_retention_keeps_all_by_default() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=1)

    for batch_count in range(1, 6):
        writer.finish_batch(batch_count)

    assert len(writer.store.files) == 6


def test_retention_keeps_the_last_and_every_nth() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=1, keep_last=2, keep_every=4)

    for batch_count in range(1, 12):
        writer.finish_batch(batch_count)

    kept = {epoch_name(1, count): count for count in (4, 8, 10, 11)}
    assert batches(writer.store) == kept | {LATEST: 11}


def test_retention_keeps_the_newest_although_latest_holds_it() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=1, keep_last=1)

    for batch_count in (9, 10, 11):
        writer.finish_batch(batch_count)

    assert batches(writer.store) == {epoch_name(1, 11): 11, LATEST: 11}


def test_retention_keeps_final() -> None:
    writer = Training(MemoryStore(), checkpoint_interval=1, keep_last=1)
    writer.finish_batch(1)
    writer.manager.save_final()

    for batch_count in (2, 3):
        writer.finish_batch(batch_count)

    assert batches(writer.store) == {epoch_name(1, 3): 3, FINAL: 1, LATEST: 3}


def test_retention_does_not_count_damaged_files() -> None:
    store = MemoryStore()
    for batch_count in (1, 2, 3):
        store.put(epoch_name(1, batch_count), [make_bytes(batch_count)])
    for batch_count in (2, 3):
        damage(store, epoch_name(1, batch_count))

    Training(store, checkpoint_interval=1, keep_last=2).finish_batch(4)

    assert set(store.files) == {epoch_name(1, count) for count in (1, 2, 3, 4)} | {LATEST}


def test_retention_reads_only_what_is_to_stay() -> None:
    store = MemoryStore()
    for batch_count in (1, 2, 3):
        store.put(epoch_name(1, batch_count), [make_bytes(batch_count)])
    damage(store, epoch_name(1, 1))

    Training(store, checkpoint_interval=1, keep_last=2).finish_batch(4)

    assert set(store.files) == {epoch_name(1, 3), epoch_name(1, 4), LATEST}


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
    store.put(epoch_name(9, 9), [content])
    writer = Training(store, checkpoint_interval=1, keep_last=1)

    for batch_count in (1, 2):
        writer.finish_batch(batch_count)

    assert set(store.files) == {epoch_name(9, 9), epoch_name(1, 2), LATEST}


@pytest.mark.parametrize("other", [{"branch": 2}, {"run_id": "run-2"}, {"branch": 0}])
def test_retention_leaves_files_of_others_alone(other: dict[str, Any]) -> None:
    store, names = MemoryStore(), [epoch_name(1, count) for count in (50, 60, 70)]
    for name, batch_count in zip(names, (50, 60, 70), strict=True):
        store.put(name, [make_bytes(batch_count, replace(RUN, **other))])
    writer = Training(store, checkpoint_interval=1, keep_last=1)

    for batch_count in (1, 2):
        writer.finish_batch(batch_count)

    assert set(store.files) == {*names, epoch_name(1, 2), LATEST}


def test_retention_leaves_foreign_files_alone() -> None:
    store = MemoryStore()
    store.put("model.pt", [make_bytes(1)])
    writer = Training(store, checkpoint_interval=1, keep_last=1)

    for batch_count in (2, 3):
        writer.finish_batch(batch_count)

    assert set(store.files) == {"model.pt", epoch_name(1, 3), LATEST}


def test_retention_happens_after_a_commit_only() -> None:
    store = FailingStore({1})
    for batch_count in (1, 2, 3):
        store.files[epoch_name(1, batch_count)] = make_bytes(batch_count)

    Training(store, checkpoint_interval=1, keep_last=1).finish_batch(4)

    assert len(store.files) == 3


class UndeletableStore(MemoryStore):
    """A store that refuses to delete."""

    def delete(self, name: str) -> None:
        raise PermissionError(name)


def test_trouble_with_retention_does_not_stop_training() -> None:
    writer = Training(UndeletableStore(), checkpoint_interval=1, keep_last=1)

    for batch_count in (1, 2, 3):
        writer.finish_batch(batch_count)

    assert batches(writer.store)[LATEST] == 3
    assert writer.failed() == []


@pytest.mark.parametrize(
    ("num_slots", "run", "after", "expected"),
    [
        (3, RUN, 0, [6]),
        (3, RUN, 6, []),  # it has its name
        (3, replace(RUN, branch=RUN.branch + 1), 0, []),
        (3, replace(RUN, origin="abc"), 0, []),  # it may be where the branch begins
        (3, replace(RUN, origin="abc"), 3, [6]),
        (2, RUN, 0, []),  # the next capture would write over the newest
    ],
)
def test_what_was_due_a_name_is_asked_for_by_the_next_trainer(
    num_slots: int, run: Run, after: int, expected: list[int]
) -> None:
    slots = private_slots(num_slots=num_slots, header_bytes=10_000, body_bytes=10_000)
    snapshots = Snapshots(slots)
    for batch_count in (5, 6, 7)[-num_slots:]:
        snapshots.capture(make_state(batch_count))
    jobs = overdue(slots, MemoryStore(), run, 3, after=after, before=7)
    assert [each["names"] for each in jobs] == [[epoch_name(1, count)] for count in expected]
    assert all(slots.read(each["slot"]) for each in jobs)


def test_a_name_that_has_come_to_be_meanwhile_is_not_given_again() -> None:
    store = MemoryStore()
    training = Training(store, checkpoint_interval=3)
    for batch_count in (5, 6):
        training.finish_batch(batch_count)
    training.manager.capture(make_state(7))
    assert epoch_name(1, 6) in store.files
    assert overdue(training.slots, store, RUN, 3, after=0, before=7) == []
    del store.files[epoch_name(1, 6)]
    assert len(overdue(training.slots, store, RUN, 3, after=0, before=7)) == 1
