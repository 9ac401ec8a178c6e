"""Others read, write and delete at the same time."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract import BIG, content
from tests.s3.proxy import LOST_ANSWER, Proxy, Reply
from trm_dist.checkpoint.s3 import S3Store

ROOT = Path(__file__).parents[2]

OTHER = BIG[::-1]
SHORTER = OTHER[: 5 << 20]

PUT_IF_TOLD = """
import sys
from trm_dist.checkpoint.s3 import S3Store
store = S3Store(sys.argv[1])
store.entries()
print("ready", flush=True)
sys.stdin.readline()
expected = sys.argv[3].encode() if len(sys.argv) > 3 else None
print(store.put_if("run.json", sys.argv[2].encode(), expected))
"""

pytestmark = pytest.mark.usefixtures("small_parts")


def again_and_again(proxy: Proxy, pattern: str, action: Callable[[], object]) -> None:
    def act() -> None:
        action()
        proxy.meanwhile(pattern, act)

    proxy.meanwhile(pattern, act)


# -- read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [OTHER, SHORTER, b"small"], ids=len)
def test_read_of_an_object_that_is_replaced_is_of_one_version(
    store: S3Store, disturbed: S3Store, proxy: Proxy, data: bytes
) -> None:
    store.put("a.pt", [BIG])
    proxy.meanwhile("bytes=1000-", lambda: store.put("a.pt", [data]))

    assert disturbed.read("a.pt") == data


def test_read_of_an_object_that_does_not_stand_still_gives_up(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    store.put("a.pt", [BIG])
    versions = iter(range(100))
    again_and_again(proxy, "bytes=1000-", lambda: store.put("a.pt", [BIG, b"%d" % next(versions)]))

    with pytest.raises(OSError, match="replaced again and again"):
        disturbed.read("a.pt")


def test_read_of_an_object_that_is_deleted_says_so(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    store.put("a.pt", [BIG])
    proxy.meanwhile("bytes=1000-", lambda: store.delete("a.pt"))

    with pytest.raises(FileNotFoundError):
        disturbed.read("a.pt")


def test_what_another_process_writes_is_seen_at_once(store: S3Store, url: str) -> None:
    other = S3Store(url)
    assert store.entries() == []

    other.put("a.pt", [b"1"])
    assert content(store) == {"a.pt": b"1"}

    other.put("a.pt", [BIG])
    assert store.read("a.pt") == BIG
    assert [entry.size_bytes for entry in store.entries()] == [len(BIG)]

    other.delete("a.pt")
    assert store.entries() == []


def test_listing_that_lies_hides_a_file_from_entries_alone(
    store: S3Store, disturbed: S3Store, proxy: Proxy, url: str
) -> None:
    store.put("a.pt", [b"old"])
    store.put("b.pt", [b"old"])
    prefix = url.partition("://")[2].partition("/")[2]
    proxy.hide(f"{prefix}/a.pt")

    assert [entry.name for entry in disturbed.entries()] == ["b.pt"]
    assert disturbed.read("a.pt") == b"old"
    assert not disturbed.put_if("a.pt", b"new", None)
    disturbed.copy("a.pt", "c.pt")
    assert content(store) == {"a.pt": b"old", "b.pt": b"old", "c.pt": b"old"}


# -- copy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(b"1", b"2"), (BIG, OTHER)], ids=["small", "in parts"])
def test_copy_of_an_object_that_is_replaced_is_of_one_version(
    store: S3Store, disturbed: S3Store, proxy: Proxy, old: bytes, new: bytes
) -> None:
    store.put("a.pt", [old])
    proxy.meanwhile("^PUT .*/b.pt(?!.*partNumber=1&)", lambda: store.put("a.pt", [new]))

    disturbed.copy("a.pt", "b.pt")

    assert content(store) == {"a.pt": new, "b.pt": new}
    assert store.leftover_uploads() == []


def test_copy_of_an_object_that_is_deleted_says_so(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    store.put("a.pt", [BIG])
    store.put("b.pt", [b"old"])
    proxy.meanwhile("partNumber=2&", lambda: store.delete("a.pt"))

    with pytest.raises(FileNotFoundError):
        disturbed.copy("a.pt", "b.pt")

    assert content(store) == {"b.pt": b"old"}
    assert store.leftover_uploads() == []


# -- put_if ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [None, b"old"])
def test_put_if_lets_a_faster_writer_win(
    store: S3Store, disturbed: S3Store, proxy: Proxy, expected: bytes | None
) -> None:
    if expected is not None:
        store.put("run.json", [expected])
    proxy.meanwhile("^PUT", lambda: store.put("run.json", [b"theirs"]))

    assert not disturbed.put_if("run.json", b"ours", expected)

    assert store.read("run.json") == b"theirs"


def test_put_if_over_what_was_just_deleted_writes_nothing(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    store.put("run.json", [b"old"])
    proxy.meanwhile("^PUT", lambda: store.delete("run.json"))

    assert not disturbed.put_if("run.json", b"new", b"old")

    assert store.entries() == []


def test_put_if_does_not_take_anothers_equal_bytes_for_its_own(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    proxy.meanwhile("^PUT", lambda: store.put_if("run.json", b"same", None))

    assert not disturbed.put_if("run.json", b"same", None)


def test_put_if_whose_answer_was_lost_and_was_then_overtaken_is_lost(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    proxy.disturb(LOST_ANSWER, "^PUT")
    proxy.meanwhile("^GET .* bytes=0-0", lambda: store.put("run.json", [b"theirs"]))

    assert not disturbed.put_if("run.json", b"ours", None)


@pytest.mark.parametrize("expected", [None, b"old"])
def test_put_if_where_the_server_has_no_conditions_compares(
    store: S3Store,
    disturbed: S3Store,
    proxy: Proxy,
    expected: bytes | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if expected is not None:
        store.put("run.json", [expected])
    proxy.disturb(Reply(501, "NotImplemented"), "^PUT")

    assert disturbed.put_if("run.json", b"1", expected)
    assert not disturbed.put_if("run.json", b"2", expected)
    assert disturbed.put_if("run.json", b"2", b"1")

    assert store.read("run.json") == b"2"
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


@pytest.mark.parametrize("expected", [None, "old"])
def test_put_if_of_many_processes_lets_one_win(
    store: S3Store, url: str, expected: str | None
) -> None:
    if expected is not None:
        store.put("run.json", [expected.encode()])
    arguments = [] if expected is None else [expected]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUT_IF_TOLD, url, f"process {number}", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0].strip() for process in processes]

    assert sorted(answers) == ["False"] * 7 + ["True"]
    assert store.read("run.json") == f"process {answers.index('True')}".encode()
