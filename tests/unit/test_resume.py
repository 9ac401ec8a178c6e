"""Where a run goes on: its newest valid state, a branch, or a fresh start; never by accident."""

import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import RUN, make_bytes, make_state, to_bytes
from trm_dist.checkpoint.catalog import find_checkpoints
from trm_dist.checkpoint.names import FINAL, LATEST, epoch_name
from trm_dist.checkpoint.publish import publish
from trm_dist.checkpoint.resume import Start, choose_start
from trm_dist.checkpoint.runs import RECORD, Run, claim, new_writer, read_run
from trm_dist.checkpoint.seal import verify_seal
from trm_dist.checkpoint.state import digest
from trm_dist.checkpoint.store import LocalStore, Store
from trm_dist.config import CheckpointConfig
from trm_dist.errors import ResumeError


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "run"))


def choose(store: Store, launch_id: str = "later", **settings: Any) -> Start:
    config = CheckpointConfig(checkpoint_dir=store.url, **settings)
    return unclaimed(choose_start(store, config, launch_id))


def unclaimed(start: Start) -> Start:
    """Return a start without who writes, so that starts of one branch are equal."""
    return replace(start, run=replace(start.run, generation=0, writer=""))


def train(store: Store, launch_id: str, *batch_counts: int, **settings: Any) -> Start:
    """Start as a training does, and leave a checkpoint after each of these batches."""
    start = choose(store, launch_id, **settings)
    run = claim(store, start.run, new_writer())
    for batch_count in batch_counts:
        data, summary = to_bytes(make_state(batch_count, run))
        publish(store, [data], own_names=[epoch_name(1, batch_count)], summary=summary)
    return start


def recorded(store: Store) -> Run | None:
    run = read_run(store)
    return replace(run, generation=0, writer="") if run else None


def place(start: Start) -> tuple[int, int] | None:
    """Return branch and batch count of the state to go on from."""
    state = start.state
    return (state["run"]["branch"], state["batch_count"]) if state else None


def path_of(store: Store, name: str) -> str:
    return os.path.join(store.url, name)


def damage(store: Store, name: str) -> None:
    """Flip a bit in the middle of a file; its seal is still read."""
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 1
    os.unlink(path_of(store, name))  # the same bytes may have a second name
    Path(path_of(store, name)).write_bytes(data)


def tear(store: Store, name: str) -> None:
    """Cut a file in the middle; nothing is known of it any more."""
    data = store.read(name)
    os.unlink(path_of(store, name))
    Path(path_of(store, name)).write_bytes(data[: len(data) // 2])


def contents(store: LocalStore) -> dict[str, bytes]:
    below = Path(store.url).rglob("*")
    return {str(each): each.read_bytes() for each in below if each.is_file()}


# -- auto ------------------------------------------------------------------------------------------


def test_empty_directory_is_a_fresh_start(store: LocalStore) -> None:
    start = choose(store, "launch-1")

    assert (start.state, start.source) == (None, "")
    assert (start.run.branch, start.run.origin, start.run.launch_id) == (1, "", "launch-1")


def test_choice_makes_no_directory(store: LocalStore) -> None:
    choose(store)

    assert not os.path.exists(store.url)


def test_choice_writes_nothing(store: LocalStore) -> None:
    train(store, "launch-1", 1, 2)
    damage(store, LATEST)
    before = contents(store)

    choose(store)
    choose(store, resume=path_of(store, epoch_name(1, 1)))

    assert contents(store) == before


def test_run_without_a_checkpoint_yet_stays_the_same_run(store: LocalStore) -> None:
    first = train(store, "launch-1")

    start = choose(store, "launch-2")

    assert start == first


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        ({LATEST: 7}, LATEST),
        ({FINAL: 7}, FINAL),
        ({epoch_name(1, 7): 7}, epoch_name(1, 7)),
        ({epoch_name(1, 9): 9, epoch_name(1, 10): 10}, epoch_name(1, 10)),
        ({epoch_name(1, 99): 99, epoch_name(1, 100): 100, LATEST: 99}, epoch_name(1, 100)),
        ({epoch_name(1, 7): 7, LATEST: 8}, LATEST),
        ({epoch_name(1, 7): 7, LATEST: 7}, LATEST),
        ({epoch_name(1, 7): 7, FINAL: 7, LATEST: 7}, LATEST),
        ({epoch_name(1, 7): 7, FINAL: 7}, FINAL),
        ({FINAL: 7, LATEST: 6}, FINAL),
        ({FINAL: 7, epoch_name(1, 8): 8, LATEST: 6}, epoch_name(1, 8)),
    ],
)
def test_auto_takes_the_newest_and_prefers_latest(
    store: LocalStore, files: dict[str, int], newest: str
) -> None:
    for name, batch_count in files.items():
        store.put(name, [make_bytes(batch_count)])

    start = choose(store)

    assert start.source == path_of(store, newest)
    assert place(start) == (1, files[newest])


def test_start_holds_the_verified_bytes_and_what_they_hold(store: LocalStore) -> None:
    train(store, "launch-1", 7)

    start = choose(store)

    assert start.source == path_of(store, LATEST)
    assert start.state is not None
    assert digest(start.state) == digest(make_state(7, start.run))


@pytest.mark.parametrize("name", ["model.pt", "checkpoint_epoch_1_batch_0.pt", "latest.pt", "x"])
def test_files_under_other_names_are_ignored(store: LocalStore, name: str) -> None:
    train(store, "launch-1", 7)
    store.put(name, [make_bytes(99)])

    assert place(choose(store)) == (1, 7)


def test_directory_of_foreign_files_is_a_fresh_start(store: LocalStore) -> None:
    store.put("model.pt", [make_bytes(99)])
    store.put("notes.txt", [b"text"])

    assert choose(store).state is None


def test_files_of_another_run_are_ignored(store: LocalStore) -> None:
    train(store, "launch-1", 7)
    other = replace(RUN, run_id="other", created_at=9e9)
    store.put(epoch_name(1, 99), [make_bytes(99, other)])

    assert place(choose(store)) == (1, 7)


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hurt", [damage, tear])
def test_damaged_latest_falls_back_to_an_epoch_file(store: LocalStore, hurt: Any) -> None:
    train(store, "launch-1", 1, 2)
    hurt(store, LATEST)

    start = choose(store)

    assert start.source == path_of(store, epoch_name(1, 2))
    assert place(start) == (1, 2)


@pytest.mark.parametrize("hurt", [damage, tear])
def test_damaged_file_is_named_in_a_warning(
    store: LocalStore, hurt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train(store, "launch-1", 1, 2)
    hurt(store, LATEST)

    with caplog.at_level(logging.WARNING):
        choose(store)

    assert [LATEST in message for message in caplog.messages] == [True]


def test_good_files_cause_no_warning(store: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    train(store, "launch-1", 1, 2)

    with caplog.at_level(logging.WARNING):
        choose(store)

    assert caplog.messages == []


def test_any_flip_in_a_seal_falls_back(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    good = store.read(LATEST)

    for bit in range(8 * good.rfind(b"trm_dist "), 8 * len(good), 9):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        store.delete(LATEST)
        Path(path_of(store, LATEST)).write_bytes(data)

        assert choose(store).source == path_of(store, epoch_name(1, 20))


@pytest.mark.parametrize("key", ["run_id", "branch", "origin", "created_at", "batch_count"])
@pytest.mark.parametrize("has_record", [True, False])
def test_seal_that_lost_a_key_falls_back(store: LocalStore, key: str, has_record: bool) -> None:
    train(store, "launch-1", 10)
    data = store.read(LATEST)
    store.put(LATEST, [data.replace(f'"{key}"'.encode(), b'"' + b"x" * len(key) + b'"')])
    if not has_record:
        store.delete(RECORD)

    assert choose(store).source == path_of(store, epoch_name(1, 10))


def test_older_files_are_tried_until_one_is_valid(store: LocalStore) -> None:
    train(store, "launch-1", 1, 2, 3)
    for name in (LATEST, epoch_name(1, 3)):
        damage(store, name)
    tear(store, epoch_name(1, 2))

    assert place(choose(store)) == (1, 1)


@pytest.mark.parametrize("hurt", [damage, tear])
@pytest.mark.parametrize("has_record", [True, False])
def test_no_valid_file_is_an_error_and_no_fresh_start(
    store: LocalStore, hurt: Any, has_record: bool
) -> None:
    train(store, "launch-1", 1)
    for name in (LATEST, epoch_name(1, 1)):
        hurt(store, name)
    if not has_record:
        store.delete(RECORD)

    with pytest.raises(ResumeError, match=rf"none of them is valid: .*{LATEST}"):
        choose(store)


def test_empty_file_under_a_documented_name_is_an_error(store: LocalStore) -> None:
    store.put(LATEST, [b""])

    with pytest.raises(ResumeError, match=f"none of them is valid: {LATEST}"):
        choose(store)


def test_file_removed_while_looking_is_passed_over(store: LocalStore) -> None:
    train(store, "launch-1", 1, 2)

    class Vanishing(LocalStore):
        def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
            if name != epoch_name(1, 1) and not name.startswith("."):
                self.delete(name)
            return super().read(name, start, num_bytes)

    assert place(choose(Vanishing(store.url))) == (1, 1)


def test_find_checkpoints_lists_damaged_ones_without_a_seal(store: LocalStore) -> None:
    train(store, "launch-1", 1)
    tear(store, LATEST)

    found = {each.name: each.seal is not None for each in find_checkpoints(store)}

    assert found == {LATEST: False, epoch_name(1, 1): True}


# -- a file to start from --------------------------------------------------------------------------


def malicious(store: LocalStore, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (path_of(store, "marker"),)

    store.put(name, [pickle.dumps(Bomb())])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda store, name: None, "there is no such file"),
        (lambda store, name: os.makedirs(path_of(store, name)), "this is a directory"),
        (lambda store, name: store.put(name, [b""]), "does not end with the seal"),
        (lambda store, name: store.put(name, [make_bytes(7)[:-9]]), "does not end with the seal"),
        (lambda store, name: store.put(name, [b"x" + make_bytes(7)]), "do not match its digest"),
        (
            lambda store, name: store.put(name, [make_bytes(7, format_version=99)]),
            "format_version 99 is newer",
        ),
        (malicious, "does not end with the seal"),
    ],
)
@pytest.mark.parametrize("has_run", [True, False])
def test_resume_from_a_bad_path_is_an_error(
    store: LocalStore, make: Any, message: str, has_run: bool
) -> None:
    if has_run:
        train(store, "launch-1", 1)
    path = path_of(store, "bad.pt")
    make(store, "bad.pt")

    with pytest.raises(ResumeError, match=message) as caught:
        choose(store, resume=path)

    assert f"--resume {path}" in str(caught.value)
    assert not os.path.exists(path_of(store, "marker"))


@pytest.mark.parametrize("ending", ["", "/"])
def test_resume_from_the_checkpoint_directory_is_an_error(store: LocalStore, ending: str) -> None:
    train(store, "launch-1", 1)

    with pytest.raises(ResumeError, match="this is a directory"):
        choose(store, resume=store.url + ending)


def test_first_start_from_a_file_begins_the_next_branch(store: LocalStore) -> None:
    first = train(store, "launch-1", 1, 2, 3)
    path = path_of(store, epoch_name(1, 2))

    start = choose(store, "launch-2", resume=path)

    origin = verify_seal(store.read(epoch_name(1, 2))).digest
    assert start.run == first.run.next_branch(origin, start.run.origin_url, "launch-2")
    assert (start.source, place(start)) == (path, (1, 2))


def test_branch_before_its_first_checkpoint_is_continued(store: LocalStore) -> None:
    train(store, "launch-1", 1, 2, 3)
    path = path_of(store, epoch_name(1, 2))
    begun = train(store, "launch-2", resume=path)

    again = choose(store, "launch-3", resume=path)

    assert again.run == begun.run
    assert place(again) == (1, 2)


@pytest.mark.parametrize("launch_id", ["launch-2", "launch-3"])
def test_same_command_again_never_rewinds(store: LocalStore, launch_id: str) -> None:
    train(store, "launch-1", 1, 2, 3)
    path = path_of(store, epoch_name(1, 1))
    begun = train(store, "launch-2", 2, resume=path)

    again = choose(store, launch_id, resume=path)

    assert again.run == begun.run
    assert place(again) == (2, 2)


def test_another_file_begins_one_more_branch(store: LocalStore) -> None:
    train(store, "launch-1", 1, 2, 3)
    train(store, "launch-2", 4, resume=path_of(store, epoch_name(1, 1)))

    start = choose(store, "launch-3", resume=path_of(store, epoch_name(1, 3)))

    assert start.run.branch == 3
    assert place(start) == (1, 3)


def test_abandoned_future_is_never_taken_by_auto(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20, 30)
    train(store, "launch-2", 11, resume=path_of(store, epoch_name(1, 10)))

    assert place(choose(store, "launch-3")) == (2, 11)


def test_abandoned_future_is_not_taken_for_a_damaged_branch(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20, 30)
    train(store, "launch-2", 11, resume=path_of(store, epoch_name(1, 10)))
    for name in (LATEST, epoch_name(1, 11)):
        damage(store, name)

    assert place(choose(store, "launch-3")) == (1, 10)


def test_auto_starts_a_branch_without_files_from_its_origin(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20, 30)
    begun = train(store, "launch-2", resume=path_of(store, epoch_name(1, 10)))

    start = choose(store, "launch-3")

    assert start.run == begun.run
    assert place(start) == (1, 10)


def test_origin_is_known_by_its_digest_under_any_name(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    train(store, "launch-2", resume=path_of(store, epoch_name(1, 20)))
    store.delete(epoch_name(1, 20))

    start = choose(store, "launch-3")

    assert (start.source, place(start)) == (path_of(store, LATEST), (1, 20))


def test_branch_that_lost_its_origin_is_an_error(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    train(store, "launch-2", resume=path_of(store, epoch_name(1, 10)))
    store.delete(epoch_name(1, 10))

    with pytest.raises(ResumeError, match="Name it with --resume PATH"):
        choose(store, "launch-3")


def test_restart_continues_its_branch_although_the_origin_is_gone(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    path = path_of(store, epoch_name(1, 10))
    train(store, "launch-2", 11, resume=path)
    store.delete(epoch_name(1, 10))

    assert place(choose(store, "launch-2", resume=path)) == (2, 11)


def test_restart_continues_its_branch_although_it_overwrote_the_origin(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    path = path_of(store, FINAL)
    store.copy(epoch_name(1, 10), FINAL)
    begun = train(store, "launch-2", 11, resume=path)
    store.copy(epoch_name(1, 11), FINAL)

    again = choose(store, "launch-2", resume=path)

    assert (again.run, place(again)) == (begun.run, (2, 11))


def test_overwrite_begins_one_more_branch_from_the_file(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    path = path_of(store, epoch_name(1, 10))
    train(store, "launch-2", 11, resume=path)

    start = choose(store, "launch-3", resume=path, overwrite=True)

    assert start.run.branch == 3
    assert place(start) == (1, 10)


def test_restart_with_overwrite_continues_its_own_branch(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    path = path_of(store, epoch_name(1, 10))
    train(store, "launch-2", 11, resume=path)
    begun = train(store, "launch-3", 12, resume=path, overwrite=True)

    again = choose(store, "launch-3", resume=path, overwrite=True)

    assert (again.run, place(again)) == (begun.run, (3, 12))


def test_file_of_another_directory_begins_a_branch_of_a_new_run(
    store: LocalStore, tmp_path: Path
) -> None:
    other = LocalStore(str(tmp_path / "other"))
    train(other, "launch-1", 10)

    start = choose(store, "launch-2", resume=path_of(other, LATEST))

    assert start.run.branch == 2
    assert start.run.run_id != train(other, "launch-1").run.run_id
    assert place(start) == (1, 10)


@pytest.mark.parametrize("has_record", [True, False])
def test_file_of_another_run_does_not_replace_the_run_of_a_used_directory(
    store: LocalStore, tmp_path: Path, has_record: bool
) -> None:
    other = LocalStore(str(tmp_path / "other"))
    train(other, "launch-1", 10)
    train(store, "launch-2", 20)
    if not has_record:
        store.delete(RECORD)

    with pytest.raises(ResumeError, match=r"is of another run than .* add --overwrite"):
        choose(store, "launch-3", resume=path_of(other, LATEST))

    asked = choose(store, "launch-3", resume=path_of(other, LATEST), overwrite=True)
    assert place(asked) == (1, 10)


def test_branch_from_another_directory_is_continued(store: LocalStore, tmp_path: Path) -> None:
    other = LocalStore(str(tmp_path / "other"))
    train(other, "launch-1", 10)
    begun = train(store, "launch-2", 11, resume=path_of(other, LATEST))

    again = choose(store, "launch-3", resume=path_of(other, LATEST))

    assert (again.run, place(again)) == (begun.run, (2, 11))


def test_file_by_a_relative_path_begins_a_branch(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(store, "launch-1", 10, 20)
    monkeypatch.chdir(store.url)

    start = choose(store, "launch-2", resume=epoch_name(1, 10))

    assert (start.run.branch, place(start)) == (2, (1, 10))


# -- the way of the guide --------------------------------------------------------------------------


def test_latest_of_the_directory_means_auto(store: LocalStore) -> None:
    first = train(store, "launch-1", 10)

    start = choose(store, "launch-2", resume=path_of(store, LATEST))

    assert start.run == first.run
    assert place(start) == (1, 10)


@pytest.mark.parametrize("spelling", ["{url}//{name}", "{url}/../run/{name}", "{url}/./{name}"])
def test_latest_in_any_spelling_means_auto(store: LocalStore, spelling: str) -> None:
    train(store, "launch-1", 10)

    start = choose(store, "launch-2", resume=spelling.format(url=store.url, name=LATEST))

    assert start.run.branch == 1


def test_latest_by_a_relative_path_means_auto(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(store, "launch-1", 10)
    monkeypatch.chdir(store.url)

    assert choose(store, "launch-2", resume=LATEST).run.branch == 1


def test_latest_that_is_older_than_an_epoch_file_gives_way(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    store.copy(epoch_name(1, 10), LATEST)

    assert place(choose(store, resume=path_of(store, LATEST))) == (1, 20)


@pytest.mark.parametrize("hurt", [damage, tear, LocalStore.delete])
def test_latest_that_is_lost_falls_back(store: LocalStore, hurt: Any) -> None:
    train(store, "launch-1", 10, 20)
    hurt(store, LATEST)

    start = choose(store, resume=path_of(store, LATEST))

    assert (start.run.branch, place(start)) == (1, (1, 20))


@pytest.mark.parametrize("has_record", [True, False])
def test_latest_refuses_to_start_fresh(store: LocalStore, has_record: bool) -> None:
    if has_record:
        train(store, "launch-1")

    with pytest.raises(ResumeError, match="holds no checkpoint"):
        choose(store, resume=path_of(store, LATEST))


# -- never -----------------------------------------------------------------------------------------


def test_never_starts_fresh_in_an_empty_directory(store: LocalStore) -> None:
    start = choose(store, "launch-1", resume="never")

    assert (start.state, start.run.launch_id) == (None, "launch-1")


@pytest.mark.parametrize("content", [make_bytes(7), b"torn"])
def test_never_refuses_a_used_directory(store: LocalStore, content: bytes) -> None:
    store.put(LATEST, [content])

    with pytest.raises(ResumeError, match=rf"already holds 1 .*{LATEST}.*--overwrite"):
        choose(store, resume="never")


def test_never_ignores_foreign_files(store: LocalStore) -> None:
    store.put("model.pt", [make_bytes(7)])

    assert choose(store, resume="never").state is None


def test_never_with_overwrite_begins_a_new_run(store: LocalStore) -> None:
    first = train(store, "launch-1", 10)

    start = choose(store, "launch-2", resume="never", overwrite=True)

    assert start.state is None
    assert start.run.run_id != first.run.run_id
    assert (start.run.branch, start.run.launch_id) == (1, "launch-2")


@pytest.mark.parametrize("overwrite", [False, True])
def test_restart_after_never_continues_its_own_run(store: LocalStore, overwrite: bool) -> None:
    if overwrite:
        train(store, "launch-1", 10, 20)
    begun = train(store, "launch-2", 5, resume="never", overwrite=overwrite)

    again = choose(store, "launch-2", resume="never", overwrite=overwrite)

    assert (again.run, place(again)) == (begun.run, (1, 5))


def test_restart_after_never_before_a_checkpoint_stays_the_same_run(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    begun = train(store, "launch-2", resume="never", overwrite=True)

    again = choose(store, "launch-2", resume="never", overwrite=True)

    assert (again.run, again.state) == (begun.run, None)


def test_auto_after_never_ignores_the_old_run(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    begun = train(store, "launch-2", 5, resume="never", overwrite=True)

    start = choose(store, "launch-3")

    assert (start.run, place(start)) == (begun.run, (1, 5))


def test_second_launch_with_never_refuses(store: LocalStore) -> None:
    train(store, "launch-1", 5, resume="never")

    with pytest.raises(ResumeError, match="already holds"):
        choose(store, "launch-2", resume="never")


# -- a lost record ---------------------------------------------------------------------------------


def test_lost_record_is_rebuilt_for_auto(store: LocalStore) -> None:
    first = train(store, "launch-1", 10, 20)
    store.delete(RECORD)

    start = train(store, "launch-2")

    assert place(start) == (1, 20)
    assert start.run == recorded(store) == first.run


def test_lost_record_is_rebuilt_on_a_branch(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20, 30)
    begun = train(store, "launch-2", 11, resume=path_of(store, epoch_name(1, 10)))
    store.delete(RECORD)

    start = choose(store, "launch-3")

    assert start.run == begun.run
    assert place(start) == (2, 11)


def test_lost_record_does_not_rewind_the_same_command(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20, 30)
    path = path_of(store, epoch_name(1, 10))
    train(store, "launch-2", 11, resume=path)
    store.delete(RECORD)

    start = choose(store, "launch-2", resume=path)

    assert (start.run.branch, place(start)) == (2, (2, 11))


def test_lost_record_of_a_branch_without_files_is_made_again(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20, 30)
    path = path_of(store, epoch_name(1, 10))
    begun = train(store, "launch-2", resume=path)
    store.delete(RECORD)

    start = choose(store, "launch-2", resume=path)

    assert start.run == begun.run
    assert place(start) == (1, 10)


def test_lost_record_is_rebuilt_of_the_newest_run(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    begun = train(store, "launch-2", 5, resume="never", overwrite=True)
    store.delete(RECORD)

    start = choose(store, "launch-3")

    assert (start.run.run_id, place(start)) == (begun.run.run_id, (1, 5))


def test_lost_record_never_makes_a_restart_of_a_nameless_launch(store: LocalStore) -> None:
    train(store, "launch-1", 10)
    store.delete(RECORD)

    with pytest.raises(ResumeError, match="already holds"):
        choose(store, "", resume="never")


def test_broken_record_is_rebuilt(store: LocalStore) -> None:
    first = train(store, "launch-1", 10)
    store.put(RECORD, [b"{"])

    assert choose(store).run.run_id == first.run.run_id


@pytest.mark.parametrize("stage", range(5))
def test_record_lost_at_any_stage_never_loses_the_present(store: LocalStore, stage: int) -> None:
    commands: list[tuple[str, list[int], dict[str, Any]]] = [
        ("launch-1", [10, 20], {}),
        ("launch-2", [30], {}),
        ("launch-3", [11], {"resume": path_of(store, epoch_name(1, 10))}),
        ("launch-4", [12], {"resume": path_of(store, epoch_name(1, 10))}),
        ("launch-5", [13], {}),
    ]
    for number, (launch_id, batch_counts, settings) in enumerate(commands):
        train(store, launch_id, *batch_counts, **settings)
        if number == stage:
            store.delete(RECORD)

    assert place(choose(store)) == (2, 13)


# -- what once went wrong --------------------------------------------------------------------------


def test_restart_of_a_launch_that_starts_over_does_not_meet_the_old_damage(
    store: LocalStore,
) -> None:
    store.put(LATEST, [b"torn"])
    begun = train(store, "launch-1", resume="never", overwrite=True)

    again = choose(store, "launch-1", resume="never", overwrite=True)

    assert again.run == begun.run


def test_lost_record_does_not_rewind_an_overwriting_launch(store: LocalStore) -> None:
    train(store, "launch-1", 10, 20)
    path = path_of(store, epoch_name(1, 10))
    train(store, "launch-2", 11, resume=path, overwrite=True)
    store.delete(RECORD)

    assert place(choose(store, "launch-2", resume=path, overwrite=True)) == (2, 11)


def test_path_below_a_file_is_refused_by_name(store: LocalStore) -> None:
    train(store, "launch-1", 10)

    with pytest.raises(ResumeError, match="--resume"):
        choose(store, resume=path_of(store, LATEST) + "/x")


def test_flip_that_makes_the_only_file_another_runs_is_no_fresh_start(store: LocalStore) -> None:
    train(store, "launch-1", 10)
    store.delete(LATEST)
    data = bytearray(store.read(epoch_name(1, 10)))
    data[bytes(data).rfind(b'"run_id": "') + 11] ^= 1
    store.put(epoch_name(1, 10), [bytes(data)])

    with pytest.raises(ResumeError, match="none of them is valid"):
        choose(store)


def test_restored_files_of_another_run_are_not_started_over(store: LocalStore) -> None:
    train(store, "launch-1", 10)
    claim(store, RUN, new_writer())

    with pytest.raises(ResumeError, match="another run"):
        choose(store)


@pytest.mark.parametrize("has_record", [True, False])
def test_same_command_goes_on_in_its_branch_after_its_path_was_cleaned_up(
    store: LocalStore, has_record: bool
) -> None:
    train(store, "launch-1", 10, 20, 30)
    path = path_of(store, epoch_name(1, 10))
    train(store, "launch-2", 11, 12, resume=path)
    for name in (epoch_name(1, count) for count in (10, 11, 20, 30)):
        store.delete(name)
    if not has_record:
        store.delete(RECORD)

    assert place(choose(store, "launch-3", resume=path)) == (2, 12)
    with pytest.raises(ResumeError, match="no such file"):
        choose(store, "launch-3", resume=path_of(store, epoch_name(1, 20)))
