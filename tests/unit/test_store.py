"""One contract for every store, and what only a local directory promises."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import MemoryStore
from trm_dist.checkpoint.store import HIDDEN, LocalStore, Store, open_store, split_url
from trm_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]

HOLD_THE_CLAIM = """
import sys, time
from trm_dist.checkpoint.store import LocalStore
print(LocalStore(sys.argv[1]).claim(0.0), flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(str(tmp_path / "run")) if request.param == "local" else MemoryStore()


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "run"))


@pytest.fixture
def holder(local: LocalStore) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has claimed the local store."""
    command = [sys.executable, "-c", HOLD_THE_CLAIM, local.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def in_directory(store: LocalStore, *inside: str) -> list[str]:
    return sorted(os.listdir(os.path.join(store.url, *inside)))


# -- the contract ----------------------------------------------------------------------------------


def test_store_satisfies_the_protocol(store: Store) -> None:
    assert isinstance(store, Store)


def test_store_is_empty_before_the_first_write(store: Store) -> None:
    assert store.entries() == []


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 1000])
def test_put_is_read_back(store: Store, data: bytes) -> None:
    store.put("a.pt", data)

    assert store.read("a.pt") == data


def test_put_takes_a_memoryview(store: Store) -> None:
    store.put("a.pt", memoryview(b"0123456789")[2:5])

    assert store.read("a.pt") == b"234"


@pytest.mark.parametrize("data", [b"new", b"", b"longer than the old one"])
def test_put_replaces_the_whole_file(store: Store, data: bytes) -> None:
    store.put("a.pt", b"the old one")

    store.put("a.pt", data)

    assert store.read("a.pt") == data


@pytest.mark.parametrize(
    ("start", "num_bytes", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (0, 0, b""),
        (8, 10, b"89"),
        (10, None, b""),
        (99, 1, b""),
    ],
)
def test_read_returns_a_range(
    store: Store, start: int, num_bytes: int | None, expected: bytes
) -> None:
    store.put("a.pt", b"0123456789")

    assert store.read("a.pt", start, num_bytes) == expected


def test_entries_give_names_and_sizes(store: Store) -> None:
    store.put("a.pt", b"123")
    store.put("b.pt", b"")

    assert {entry.name: entry.size_bytes for entry in store.entries()} == {"a.pt": 3, "b.pt": 0}


def test_entries_leave_out_what_is_hidden(store: Store) -> None:
    store.put("a.pt", b"123")
    store.put(f"{HIDDEN}/run.json", b"{}")

    assert [entry.name for entry in store.entries()] == ["a.pt"]


def test_hidden_file_is_read_back_by_its_path(store: Store) -> None:
    store.put(f"{HIDDEN}/run.json", b"{}")

    assert store.read(f"{HIDDEN}/run.json") == b"{}"


@pytest.mark.parametrize("has_files", [False, True])
def test_read_of_a_missing_file_raises(store: Store, has_files: bool) -> None:
    if has_files:
        store.put("a.pt", b"123")

    with pytest.raises(FileNotFoundError):
        store.read("b.pt")


def test_copy_gives_the_content_to_another_name(store: Store) -> None:
    store.put("a.pt", b"123")

    store.copy("a.pt", "b.pt")

    assert (store.read("a.pt"), store.read("b.pt")) == (b"123", b"123")


def test_copy_replaces_an_older_file(store: Store) -> None:
    store.put("a.pt", b"new")
    store.put("b.pt", b"older")

    store.copy("a.pt", "b.pt")

    assert store.read("b.pt") == b"new"


def test_copy_stays_when_its_source_is_replaced(store: Store) -> None:
    store.put("a.pt", b"one")
    store.copy("a.pt", "b.pt")

    store.put("a.pt", b"two")

    assert store.read("b.pt") == b"one"


def test_copy_stays_when_its_source_is_deleted(store: Store) -> None:
    store.put("a.pt", b"one")
    store.copy("a.pt", "b.pt")

    store.delete("a.pt")

    assert [(entry.name, store.read(entry.name)) for entry in store.entries()] == [("b.pt", b"one")]


def test_copy_may_be_repeated(store: Store) -> None:
    store.put("a.pt", b"one")

    store.copy("a.pt", "b.pt")
    store.copy("a.pt", "b.pt")

    assert store.read("b.pt") == b"one"


def test_copy_of_a_missing_file_raises(store: Store) -> None:
    store.put("b.pt", b"stays")

    with pytest.raises(FileNotFoundError):
        store.copy("a.pt", "b.pt")

    assert store.read("b.pt") == b"stays"


@pytest.mark.parametrize("name", ["a.pt", "missing.pt"])
def test_delete_leaves_no_file_of_the_name(store: Store, name: str) -> None:
    store.put("a.pt", b"one")

    store.delete(name)

    assert name not in [entry.name for entry in store.entries()]


@pytest.mark.parametrize(
    ("current", "expected", "is_written"),
    [
        (None, None, True),
        (None, b"old", False),
        (b"old", None, False),
        (b"old", b"old", True),
        (b"old", b"older", False),
        (b"", None, False),
        (b"", b"", True),
    ],
)
def test_put_if_writes_only_over_what_was_expected(
    store: Store, current: bytes | None, expected: bytes | None, is_written: bool
) -> None:
    if current is not None:
        store.put("run.json", current)

    assert store.put_if("run.json", b"new", expected) is is_written

    left = {entry.name: store.read(entry.name) for entry in store.entries()}
    assert left.get("run.json") == (b"new" if is_written else current)


def test_claim_of_an_unclaimed_store_succeeds(store: Store) -> None:
    assert store.claim(0.0)


def test_check_writable_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    store.check_writable()

    assert store.entries() == []
    assert list(tmp_path.iterdir()) == []


def test_free_bytes_is_a_size_or_unknown(store: Store) -> None:
    free = store.free_bytes()

    assert free is None or free > 0


# -- a local directory -----------------------------------------------------------------------------


def test_local_copy_is_a_hard_link(local: LocalStore) -> None:
    local.put("a.pt", b"123")

    local.copy("a.pt", "b.pt")

    assert os.path.samefile(f"{local.url}/a.pt", f"{local.url}/b.pt")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_local_file_has_the_mode_of_the_umask(local: LocalStore, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        local.put("a.pt", b"123")
    finally:
        os.umask(before)

    assert stat.S_IMODE(os.stat(f"{local.url}/a.pt").st_mode) == mode


def test_local_top_level_holds_nothing_but_what_was_put(local: LocalStore) -> None:
    local.put("a.pt", b"123")
    local.copy("a.pt", "b.pt")
    local.put_if("c.pt", b"123", None)
    local.claim(0.0)
    local.check_writable()

    assert in_directory(local) == [HIDDEN, "a.pt", "b.pt", "c.pt"]


def test_local_writes_leave_no_temporary_file(local: LocalStore) -> None:
    local.put("a.pt", b"123")
    local.copy("a.pt", "b.pt")
    local.copy("a.pt", "b.pt")
    local.copy("b.pt", "b.pt")

    assert in_directory(local, HIDDEN) == []


def test_local_put_that_fails_leaves_no_temporary_file(local: LocalStore) -> None:
    os.makedirs(f"{local.url}/a.pt")  # nothing can be renamed over a directory

    with pytest.raises(OSError, match=r"a\.pt"):
        local.put("a.pt", b"123")

    assert in_directory(local, HIDDEN) == []


def test_local_copy_that_fails_leaves_no_temporary_file(local: LocalStore) -> None:
    os.makedirs(f"{local.url}/b.pt")
    local.put("a.pt", b"123")

    with pytest.raises(OSError, match=r"b\.pt"):
        local.copy("a.pt", "b.pt")

    assert in_directory(local, HIDDEN) == []


def test_local_copy_of_a_missing_file_leaves_no_temporary_file(local: LocalStore) -> None:
    with pytest.raises(FileNotFoundError):
        local.copy("a.pt", "b.pt")

    assert in_directory(local, HIDDEN) == []


def test_local_entries_leave_out_directories(local: LocalStore) -> None:
    os.makedirs(f"{local.url}/checkpoint_latest.pt")

    assert local.entries() == []


def test_local_entries_give_the_time_of_writing(local: LocalStore) -> None:
    local.put("a.pt", b"123")
    os.utime(f"{local.url}/a.pt", (5.0, 1234.5))

    assert [entry.modified_s for entry in local.entries()] == [1234.5]


def test_local_put_survives_removal_of_the_whole_directory(local: LocalStore) -> None:
    local.put("a.pt", b"123")
    os.remove(f"{local.url}/a.pt")
    os.rmdir(f"{local.url}/{HIDDEN}")
    os.rmdir(local.url)

    local.put("b.pt", b"456")

    assert local.read("b.pt") == b"456"


def test_claim_excludes_another_process(local: LocalStore, holder: "subprocess.Popen[str]") -> None:
    assert not local.claim(0.0)


def test_claim_is_free_after_its_holder_is_killed(
    local: LocalStore, holder: "subprocess.Popen[str]"
) -> None:
    holder.send_signal(signal.SIGKILL)

    assert local.claim(10.0)


def test_claim_removes_leftovers_of_dead_writers(local: LocalStore) -> None:
    local.put(f"{HIDDEN}/run.json", b"{}")
    for name in ("tmp-1-0", "tmp-99-7"):
        local.put(f"{HIDDEN}/{name}", b"torn")

    local.claim(0.0)

    assert in_directory(local, HIDDEN) == ["run.json", "writer.lock"]


def test_claim_that_is_refused_removes_nothing(
    local: LocalStore, holder: "subprocess.Popen[str]"
) -> None:
    local.put(f"{HIDDEN}/tmp-1-0", b"of the living writer")

    local.claim(0.0)

    assert "tmp-1-0" in in_directory(local, HIDDEN)


@pytest.mark.parametrize("inside", ["run", "run/deeper", "run/a/b/c"])
def test_check_writable_raises_below_a_regular_file(tmp_path: Path, inside: str) -> None:
    (tmp_path / "run").write_bytes(b"a file, not a directory")

    with pytest.raises(NotADirectoryError):
        LocalStore(str(tmp_path / inside)).check_writable()


def test_check_writable_makes_no_directory(tmp_path: Path) -> None:
    LocalStore(str(tmp_path / "a" / "b" / "c")).check_writable()

    assert list(tmp_path.iterdir()) == []


def test_entries_of_a_regular_file_raise(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"a file, not a directory")

    with pytest.raises(NotADirectoryError):
        LocalStore(str(tmp_path / "run")).entries()


# -- locations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("checkpoints", "checkpoints"),
        ("/data/run", "/data/run"),
        ("file:///data/run", "/data/run"),
        ("local:///data/run", "/data/run"),
    ],
)
def test_open_store_opens_a_directory(url: str, path: str) -> None:
    assert open_store(url).url == path


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket", "nonsense://x"])
def test_open_store_refuses_other_kinds_of_url(url: str) -> None:
    with pytest.raises(ConfigError, match=url):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("a.pt", (".", "a.pt")),
        ("run/a.pt", ("run", "a.pt")),
        ("/a.pt", ("/", "a.pt")),
        ("/data/run/a.pt", ("/data/run", "a.pt")),
        ("s3://bucket/run/a.pt", ("s3://bucket/run", "a.pt")),
        ("run/", ("run", "")),
    ],
)
def test_split_url_gives_directory_and_name(url: str, parts: tuple[str, str]) -> None:
    assert split_url(url) == parts


def test_root_of_a_file_system_is_a_directory() -> None:
    directory, name = split_url("file:///x.pt")
    assert (open_store(directory).url, name) == ("/", "x.pt")
