"""Every store keeps the contract; and what only a local directory promises."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.contract import ForbiddenError, StoreContract, content, forbid
from tests.fakes import MemoryStore
from trm_dist.checkpoint import store as store_module
from trm_dist.checkpoint.remote import RemoteStore
from trm_dist.checkpoint.s3 import S3Store
from trm_dist.checkpoint.store import HIDDEN, LocalStore, Store, open_store, split_url
from trm_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]

HOLD_THE_LOCK = """
import fcntl, sys, time
with open(sys.argv[1], "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(60)
"""

PUT_IF_TOLD = """
import sys
from trm_dist.checkpoint.store import LocalStore
store = LocalStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(store.put_if("run.json", sys.argv[2].encode(), b"old"))
"""


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "run"))


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, local: LocalStore) -> Store:
        return local


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestRemoteStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        yield RemoteStore(f"memory:/{tmp_path}/")
        fsspec.filesystem("memory").store.clear()


def in_directory(store: LocalStore, *inside: str) -> list[str]:
    return sorted(os.listdir(os.path.join(store.url, *inside)))


# -- a local directory -----------------------------------------------------------------------------


def test_local_copy_is_a_hard_link(local: LocalStore) -> None:
    local.put("a.pt", [b"123"])

    local.copy("a.pt", "b.pt")

    assert os.path.samefile(f"{local.url}/a.pt", f"{local.url}/b.pt")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_local_file_has_the_mode_of_the_umask(local: LocalStore, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        local.put("a.pt", [b"123"])
    finally:
        os.umask(before)

    assert stat.S_IMODE(os.stat(f"{local.url}/a.pt").st_mode) == mode


def test_local_top_level_holds_nothing_but_what_was_put(local: LocalStore) -> None:
    local.put("a.pt", [b"123"])
    local.copy("a.pt", "b.pt")
    local.put_if("c.pt", b"123", None)
    local.check_writable()
    local.remove_leftovers()

    assert in_directory(local) == [HIDDEN, "a.pt", "b.pt", "c.pt"]


def test_local_writes_leave_no_temporary_file(local: LocalStore) -> None:
    local.put("a.pt", [b"123"])
    local.copy("a.pt", "b.pt")
    local.copy("a.pt", "b.pt")
    local.copy("b.pt", "b.pt")
    local.put_if("a.pt", b"456", b"123")
    local.put_if("a.pt", b"456", b"123")

    assert in_directory(local, HIDDEN) == ["lock"]


def test_local_put_that_fails_leaves_no_temporary_file(local: LocalStore) -> None:
    os.makedirs(f"{local.url}/a.pt")  # nothing can be renamed over a directory

    with pytest.raises(OSError, match=r"a\.pt"):
        local.put("a.pt", [b"123"])

    assert in_directory(local, HIDDEN) == ["lock"]


def test_local_copy_that_fails_leaves_no_temporary_file(local: LocalStore) -> None:
    os.makedirs(f"{local.url}/b.pt")
    local.put("a.pt", [b"123"])

    with pytest.raises(OSError, match=r"b\.pt"):
        local.copy("a.pt", "b.pt")

    assert in_directory(local, HIDDEN) == ["lock"]


def test_local_copy_of_a_missing_file_leaves_no_temporary_file(local: LocalStore) -> None:
    with pytest.raises(FileNotFoundError):
        local.copy("a.pt", "b.pt")

    assert in_directory(local, HIDDEN) == []


def test_local_guard_that_raises_leaves_no_temporary_file(local: LocalStore) -> None:
    local.put("a.pt", [b"old"])

    with pytest.raises(ForbiddenError):
        local.put("a.pt", [b"new"], forbid)
    with pytest.raises(ForbiddenError):
        local.copy("a.pt", "b.pt", forbid)

    assert in_directory(local, HIDDEN) == ["lock"]


def test_local_copy_where_links_are_not_possible_is_a_copy(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    local.put("a.pt", [b"new"])
    local.put("b.pt", [b"old"])

    with pytest.raises(ForbiddenError):
        local.copy("a.pt", "b.pt", forbid)
    assert local.read("b.pt") == b"old"

    local.copy("a.pt", "b.pt")
    assert local.read("b.pt") == b"new"
    assert not os.path.samefile(f"{local.url}/a.pt", f"{local.url}/b.pt")


def test_local_remove_leftovers_removes_what_dead_writers_left(local: LocalStore) -> None:
    local.put(f"{HIDDEN}/run.json", [b"{}"])
    for name in ("tmp-1-0", "tmp-0123456789abcdef"):
        local.put(f"{HIDDEN}/{name}", [b"torn"])
    assert sorted(local.leftovers()) == [f"{HIDDEN}/tmp-0123456789abcdef", f"{HIDDEN}/tmp-1-0"]

    local.remove_leftovers()

    assert in_directory(local, HIDDEN) == ["lock", "run.json"]


def test_local_entries_leave_out_directories(local: LocalStore) -> None:
    os.makedirs(f"{local.url}/checkpoint_latest.pt")

    assert local.entries() == []


def test_local_entries_give_the_time_of_writing(local: LocalStore) -> None:
    local.put("a.pt", [b"123"])
    os.utime(f"{local.url}/a.pt", (5.0, 1234.5))

    assert [entry.modified_s for entry in local.entries()] == [1234.5]


def test_local_put_survives_removal_of_the_whole_directory(local: LocalStore) -> None:
    local.put("a.pt", [b"123"])
    os.remove(f"{local.url}/a.pt")
    os.remove(f"{local.url}/{HIDDEN}/lock")
    os.rmdir(f"{local.url}/{HIDDEN}")
    os.rmdir(local.url)

    local.put("b.pt", [b"456"])

    assert local.read("b.pt") == b"456"


def test_local_identity_is_the_same_however_it_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")

    spelled = [f"{tmp_path}/run", f"{tmp_path}/./run/", f"{tmp_path}/link", f"{tmp_path}/x/../run"]

    assert len({LocalStore(each).identity for each in spelled}) == 1


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


# -- two writers of a local directory --------------------------------------------------------------


@pytest.fixture
def lock_holder(local: LocalStore) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of the directory, for as long as it lives."""
    local.put("a.pt", [b"old"])
    command = [sys.executable, "-c", HOLD_THE_LOCK, f"{local.url}/{HIDDEN}/lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_lock_that_is_held_too_long_is_an_error(
    local: LocalStore, lock_holder: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOCK_WAIT_S", 0.05)

    with pytest.raises(TimeoutError, match="another process"):
        local.put("a.pt", [b"new"])

    assert content(local) == {"a.pt": b"old"}
    assert in_directory(local, HIDDEN) == ["lock"]


def test_lock_of_a_process_that_was_killed_is_free(
    local: LocalStore, lock_holder: "subprocess.Popen[str]"
) -> None:
    lock_holder.kill()

    local.put("a.pt", [b"new"])

    assert local.read("a.pt") == b"new"


def test_put_if_of_many_threads_lets_one_win(local: LocalStore) -> None:
    local.put("run.json", [b"old"])
    won: list[int] = []

    def try_to_win(number: int) -> None:
        if LocalStore(local.url).put_if("run.json", b"%d" % number, b"old"):
            won.append(number)

    threads = [threading.Thread(target=try_to_win, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [local.read("run.json")] == [b"%d" % number for number in won]


def test_put_if_of_many_processes_lets_one_win(local: LocalStore) -> None:
    local.put("run.json", [b"old"])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUT_IF_TOLD, local.url, str(number)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

    answers = [process.communicate()[0].strip() for process in processes]

    assert sorted(answers) == ["False", "False", "False", "True"]
    assert local.read("run.json") == str(answers.index("True")).encode()


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


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_open_store_opens_a_bucket(scheme: str) -> None:
    store = open_store(f"{scheme}://bucket/run/")

    assert isinstance(store, S3Store)
    assert store.url == f"{scheme}://bucket/run"


def test_open_store_opens_what_fsspec_knows() -> None:
    store = open_store("memory://run/")

    assert isinstance(store, RemoteStore)
    assert store.url == "memory://run"


@pytest.mark.parametrize(
    "url",
    [
        "nonsense://x",
        "gs://bucket/run",  # its package is not installed
        "memory://",
        "s3://",
        "s3:///run",
        "simplecache::memory://run",
    ],
)
def test_open_store_refuses_what_cannot_work(url: str) -> None:
    with pytest.raises(ConfigError, match=url):
        open_store(url)


@pytest.mark.parametrize("url", ["memory://run/", "memory:///run", "memory://run"])
def test_identity_of_a_remote_store_is_the_same_however_it_is_spelled(url: str) -> None:
    assert RemoteStore(url).identity == "memory:///run"


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


def test_file_of_no_bucket_is_not_taken_for_a_local_one() -> None:
    assert split_url("s3://m.pt") == ("s3://", "m.pt")


def test_root_of_a_file_system_is_a_directory() -> None:
    directory, name = split_url("file:///x.pt")
    assert (open_store(directory).url, name) == ("/", "x.pt")
