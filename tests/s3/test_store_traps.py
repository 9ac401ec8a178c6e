"""What s3fs and its kind are known to get wrong, each tried on our store."""

import itertools
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import pytest

from tests.contract import BIG, content
from tests.s3.proxy import Proxy, Reply
from tests.s3.server import BUCKET, Server
from trm_dist.checkpoint import s3, s3_transfer
from trm_dist.checkpoint.s3 import S3Store
from trm_dist.checkpoint.store import HIDDEN

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

RAISE_AFTER_USE = """
import sys, threading
from trm_dist.checkpoint import s3
from trm_dist.checkpoint.s3 import S3Store
s3.SINGLE_BYTES = s3.FIRST_BYTES = 1000
store = S3Store(sys.argv[1])
store.put("a.pt", [b"small"])
store.put("b.pt", [bytes(6 << 20)])
store.copy("b.pt", "c.pt")
assert len(store.read("c.pt")) == 6 << 20
raise RuntimeError("nobody catches this")
"""

RAISE_DURING_USE = """
import sys
from trm_dist.checkpoint import s3
from trm_dist.checkpoint.s3 import S3Store
s3.SINGLE_BYTES = s3.FIRST_BYTES = 1000

def fail():
    raise RuntimeError("nobody catches this")

S3Store(sys.argv[1]).put("b.pt", [bytes(6 << 20)], fail)
"""

USE_AFTER_FORK = """
import os, sys
from trm_dist.checkpoint import s3
from trm_dist.checkpoint.s3 import S3Store
s3.SINGLE_BYTES = s3.FIRST_BYTES = 1000
store = S3Store(sys.argv[1])

def work(name):
    for _ in range(5):
        data = name.encode() * (3 << 20)
        store.put(name, [data])
        assert store.read(name) == data
        assert store.read("small") == b"before"

store.put("small", [b"before"])
child = os.fork()
work("parent" if child else "childs")
if not child:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

PUT_FOR_EVER = """
import sys
from trm_dist.checkpoint.s3 import S3Store
store = S3Store(sys.argv[1])
print("ready", flush=True)
while True:
    store.put("a.pt", [bytes(200 << 20)])
"""

START_SERVER = """
import sys, time
from pathlib import Path
from tests.s3.server import Server
server = Server(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}  # nobody may have waited for it


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def begin_uploads(server: Server, keys: list[str]) -> None:
    client = server.client()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.create_multipart_upload(Bucket=BUCKET, Key=key), keys))


def prefix(store: S3Store) -> str:
    return store.url.removeprefix(f"s3://{BUCKET}/")


# -- what ends badly publishes nothing -------------------------------------------------------------


@pytest.mark.usefixtures("small_parts")
def test_error_while_the_content_is_made_publishes_nothing(store: S3Store) -> None:
    class Broken(Sequence[bytes]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> bytes:
            if index == 2:
                raise RuntimeError("no more")
            return BIG

    store.put("a.pt", [b"old"])

    with pytest.raises(RuntimeError, match="no more"):
        store.put("a.pt", Broken())

    assert content(store) == {"a.pt": b"old"}
    assert store.leftover_uploads() == []


@pytest.mark.usefixtures("small_parts")
def test_interrupted_upload_is_not_published_later(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    store.put("a.pt", [b"old"])
    proxy.meanwhile("partNumber=2&", lambda: os.kill(os.getpid(), signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        disturbed.put("a.pt", [BIG])

    assert content(store) == {"a.pt": b"old"}
    assert store.leftover_uploads() == []
    assert not any("uploadId" in seen for seen in proxy.seen if seen.startswith("POST"))


def test_interrupted_single_upload_is_not_published_later(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    store.put("a.pt", [b"old"])
    proxy.meanwhile("^PUT", lambda: os.kill(os.getpid(), signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        disturbed.put("a.pt", [bytes(50 * MIB)])  # more than fits into the sockets

    assert content(store) == {"a.pt": b"old"}


class SeenError(Exception):
    """A request was looked at, and is not sent."""


def test_body_is_signed_over_https_and_carries_its_md5(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:1")
    store = S3Store(url)
    seen: dict[str, bytes] = {}

    def look(request: Any, **_: object) -> None:
        seen.update(request.headers.items())
        raise SeenError

    store._requests._client.meta.events.register("before-send.s3.PutObject", look)

    with pytest.raises(SeenError):
        store.put("a.pt", [b"new"])

    assert seen["X-Amz-Content-SHA256"] == sha256(b"new").hexdigest().encode()
    assert seen["Content-MD5"] == b64encode(md5(b"new", usedforsecurity=False).digest())


def test_killed_writer_leaves_the_old_content_and_an_upload(
    store: S3Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a.pt", [b"old"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    command = [sys.executable, "-c", PUT_FOR_EVER, store.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        proxy.meanwhile("partNumber=4&", writer.kill)
        assert writer.wait(60) == -signal.SIGKILL

    assert content(store) == {"a.pt": b"old"}
    assert store.leftovers() == ["a.pt"]
    store.remove_leftovers()
    assert store.leftovers() == []


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [RAISE_AFTER_USE, RAISE_DURING_USE], ids=["after", "during"])
def test_process_ends_with_an_error_nobody_catches(url: str, script: str) -> None:
    ended = run(script, url)

    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: nobody catches this\n")


def test_store_is_used_on_both_sides_of_a_fork(store: S3Store, url: str) -> None:
    ended = run(USE_AFTER_FORK, url)

    assert ended.returncode == 0, ended.stderr
    assert sorted(content(store)) == ["childs", "parent", "small"]


@pytest.mark.soak
def test_server_of_a_test_that_was_killed_dies_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START_SERVER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- leftovers -------------------------------------------------------------------------------------


def test_leftovers_of_others_stay(store: S3Store, server: Server) -> None:
    ours = [f"{prefix(store)}/{name}" for name in ("a.pt", "b.pt", f"{HIDDEN}/run.json")]
    theirs = [f"{prefix(store)}{name}" for name in ("-2/a.pt", ".pt", "/deeper/a.pt")]
    begin_uploads(server, ours + theirs)

    assert sorted(store.leftovers()) == [f"{HIDDEN}/run.json", "a.pt", "b.pt"]
    store.remove_leftovers()

    left = server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix(store))["Uploads"]
    assert sorted(each["Key"] for each in left) == sorted(theirs)


def test_one_leftover_may_be_removed(store: S3Store, server: Server) -> None:
    begin_uploads(server, [f"{prefix(store)}/{name}" for name in ("a.pt", "b.pt")])
    first, second = store.leftover_uploads()

    store.abort_upload(first)
    store.abort_upload(first)

    assert store.leftover_uploads() == [second]


def test_more_leftovers_than_one_page_are_removed(store: S3Store, server: Server) -> None:
    begin_uploads(server, [f"{prefix(store)}/{number:04d}.pt" for number in range(1001)])

    assert len(store.leftover_uploads()) == 1001
    store.remove_leftovers()

    assert store.leftover_uploads() == []


@pytest.mark.parametrize(
    "reply", [Reply(501, "NotImplemented"), Reply(403, "AccessDenied")], ids=str
)
def test_leftovers_that_cannot_be_listed_are_no_failure(
    disturbed: S3Store, proxy: Proxy, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.disturb(reply, r"\?uploads")

    disturbed.remove_leftovers()

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reply.code in caplog.text


def test_more_files_than_one_page_are_listed(store: S3Store, server: Server) -> None:
    client = server.client()
    keys = [f"{prefix(store)}/{number:04d}.pt" for number in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=BUCKET, Key=key, Body=b"1"), keys))

    assert [entry.name for entry in store.entries()] == [f"{n:04d}.pt" for n in range(1001)]


def test_entries_of_the_top_of_a_bucket(server: Server) -> None:
    server.client().put_object(Bucket=BUCKET, Key="top.pt", Body=b"1")

    names = [entry.name for entry in S3Store(f"s3://{BUCKET}").entries()]

    assert "top.pt" in names
    assert not any("/" in name for name in names)


# -- cost ------------------------------------------------------------------------------------------


def test_copy_is_one_request_that_moves_no_content(
    store: S3Store, disturbed: S3Store, proxy: Proxy
) -> None:
    store.put("a.pt", [bytes(70 * MIB)])

    disturbed.copy("a.pt", "b.pt")

    assert [request.split()[0] for request in proxy.seen] == ["GET", "PUT"]
    assert proxy.seen[0].endswith("bytes=0-0")


def test_upload_holds_a_few_parts_in_memory(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    piece = bytes(8 * MIB)
    pieces = [memoryview(piece)] * 12

    tracemalloc.start()
    store.put("a.pt", pieces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 2 * s3_transfer.PARALLEL * s3.PART_BYTES
    assert store.read("a.pt") == piece * 12


def test_view_holds_its_content_once(store: S3Store) -> None:
    store.put("a.pt", [bytes(100 * MIB)])

    tracemalloc.start()
    data = store.view("a.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(data) < peak < 1.1 * len(data)


def test_upload_has_at_most_ten_thousand_parts() -> None:
    parts = s3_transfer.spans(0, 5 << 40, s3.PART_BYTES)

    assert len(parts) <= 10_000
    assert parts[0][0] == 0
    assert parts[-1][1] == 5 << 40
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))


def test_long_read_says_how_far_it_is(
    store: S3Store,
    disturbed: S3Store,
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_transfer, "REPORT_EVERY_S", 0.2)
    store.put("a.pt", [bytes(20 * MIB)])
    proxy.slow_down(20 * MIB)

    with caplog.at_level("INFO"):
        disturbed.read("a.pt")

    lines = [message for message in caplog.messages if message.startswith("reading a.pt: ")]
    assert lines
    assert all(line.endswith(" of 20 MiB") for line in lines)
