"""One fault is survived; a lasting one ends in one clear error, and what was there still stands."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.contract import BIG, ForbiddenError, content
from tests.s3.proxy import (
    CONNECTION_FAULTS,
    CUT_REQUESTS,
    LOST_ANSWER,
    PASSING_REPLIES,
    RESET,
    STALL,
    TRUNCATED,
    Proxy,
    Reply,
)
from trm_dist.checkpoint.s3 import S3Store

OLD = {"a.pt": b"old", "run.json": b"old"}
NEW = BIG[::-1]

FOREVER = 10**6


@dataclass(frozen=True)
class Work:
    """Something a store is asked to do, one request of it, and what there is afterwards."""

    do: Callable[[S3Store], object]
    request: str
    answer: object = None
    changes: tuple[tuple[str, bytes], ...] = ()
    needs_big: bool = False


def read_names(store: S3Store) -> object:
    return sorted((entry.name, entry.size_bytes) for entry in store.entries())


def put_small(store: S3Store) -> None:
    store.put("a.pt", [b"new"])


def put_big(store: S3Store) -> None:
    store.put("a.pt", [NEW])


def copy_small(store: S3Store) -> None:
    store.copy("run.json", "a.pt")


def copy_big(store: S3Store) -> None:
    store.copy("big.pt", "a.pt")


SMALL, BIG_OVER, NEW_OVER = (("a.pt", b"new"),), (("a.pt", BIG),), (("a.pt", NEW),)
CREATE, COMPLETE = r"^POST \S+\?uploads", r"^POST \S+uploadId="

WORK = {
    "put": Work(put_small, "^PUT", None, SMALL),
    "put in parts: begin": Work(put_big, CREATE, None, NEW_OVER),
    "put in parts: first part": Work(put_big, "partNumber=1&", None, NEW_OVER),
    "put in parts: last part": Work(put_big, "partNumber=2&", None, NEW_OVER),
    "put in parts: complete": Work(put_big, COMPLETE, None, NEW_OVER),
    "read": Work(lambda store: store.read("a.pt"), "^GET", b"old"),
    "read in parts: head": Work(lambda store: store.read("big.pt"), "bytes=0-", BIG, (), True),
    "read in parts: part": Work(lambda store: store.read("big.pt"), "bytes=1000-", BIG, (), True),
    "copy: look up": Work(copy_small, "^GET", None, (("a.pt", b"old"),)),
    "copy": Work(copy_small, "^PUT", None, (("a.pt", b"old"),)),
    "copy in parts: part": Work(copy_big, "partNumber=2&", None, BIG_OVER, True),
    "copy in parts: complete": Work(copy_big, COMPLETE, None, BIG_OVER, True),
    "entries": Work(read_names, "list-type=2", [(name, len(OLD[name])) for name in sorted(OLD)]),
    "put_if": Work(
        lambda store: store.put_if("run.json", b"new", b"old"),
        "^PUT",
        True,
        (("run.json", b"new"),),
    ),
    "put_if: new": Work(
        lambda store: store.put_if("new.json", b"new", None), "^PUT", True, (("new.json", b"new"),)
    ),
    "put_if: compare": Work(
        lambda store: store.put_if("run.json", b"new", b"old"),
        "^GET",
        True,
        (("run.json", b"new"),),
    ),
    "delete": Work(lambda store: store.delete("missing.pt"), "^DELETE"),
    "check_writable": Work(lambda store: store.check_writable(), "^PUT"),
}

STALLED = ["put", "put in parts: last part", "put in parts: complete", "read", "entries", "put_if"]

LATE = ["copy", "copy in parts: part", "put in parts: complete", "copy in parts: complete"]

ALL_WORK = pytest.mark.parametrize("work", WORK.values(), ids=WORK)

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture
def work() -> Work:
    """What tests without a work of their own need."""
    return WORK["put"]


@pytest.fixture
def old(store: S3Store, work: Work) -> dict[str, bytes]:
    """What is there before."""
    old = OLD | {"big.pt": BIG} if work.needs_big else OLD
    for name, data in old.items():
        store.put(name, [data])
    return old


@pytest.mark.parametrize("fault", [*CONNECTION_FAULTS, *PASSING_REPLIES], ids=str)
@ALL_WORK
def test_one_fault_is_survived(
    store: S3Store,
    disturbed: S3Store,
    proxy: Proxy,
    old: dict[str, bytes],
    work: Work,
    fault: str | Reply,
) -> None:
    proxy.disturb(fault, work.request)

    assert work.do(disturbed) == work.answer

    assert proxy.num_disturbed == 1
    assert content(store) == old | dict(work.changes)
    if work.request == CREATE and fault in {LOST_ANSWER, TRUNCATED}:
        store.remove_leftovers()  # nobody was told its number
    assert store.leftover_uploads() == []


@pytest.mark.parametrize("work", [WORK[name] for name in LATE], ids=LATE)
def test_error_in_an_answer_that_began_as_a_success_is_survived(
    store: S3Store, disturbed: S3Store, proxy: Proxy, old: dict[str, bytes], work: Work
) -> None:
    proxy.disturb(Reply(200, "InternalError"), work.request)

    work.do(disturbed)

    assert proxy.num_disturbed == 1
    assert content(store) == old | dict(work.changes)
    assert store.leftover_uploads() == []


@pytest.mark.parametrize("work", [WORK[name] for name in STALLED], ids=STALLED)
def test_server_that_falls_silent_is_survived(
    store: S3Store, disturbed: S3Store, proxy: Proxy, old: dict[str, bytes], work: Work
) -> None:
    proxy.disturb(STALL, work.request)

    assert work.do(disturbed) == work.answer

    assert proxy.num_disturbed == 1
    assert content(store) == old | dict(work.changes)
    assert store.leftover_uploads() == []


@pytest.mark.usefixtures("impatience")
@pytest.mark.parametrize("fault", [LOST_ANSWER, *CUT_REQUESTS, Reply(503, "SlowDown")], ids=str)
@ALL_WORK
def test_fault_that_lasts_is_one_clear_error(
    store: S3Store,
    disturbed: S3Store,
    proxy: Proxy,
    old: dict[str, bytes],
    work: Work,
    fault: str | Reply,
) -> None:
    proxy.disturb(fault, work.request, FOREVER)

    with pytest.raises(OSError, match=r"SlowDown|Connection.*closed") as caught:
        work.do(disturbed)

    assert not isinstance(caught.value, FileNotFoundError | PermissionError)
    assert proxy.num_disturbed > 1
    # Where only the answers got lost, the new content may be there; but it is whole.
    assert content(store) in (old, old | dict(work.changes))
    assert fault == LOST_ANSWER or content(store) == old
    if work.request == CREATE and fault == LOST_ANSWER:
        store.remove_leftovers()
    assert store.leftover_uploads() == []


@ALL_WORK
def test_refusal_is_final(
    store: S3Store, disturbed: S3Store, proxy: Proxy, old: dict[str, bytes], work: Work
) -> None:
    proxy.disturb(Reply(403, "AccessDenied"), work.request, FOREVER)

    with pytest.raises(PermissionError, match="AccessDenied"):
        work.do(disturbed)

    assert proxy.num_disturbed == 1
    assert content(store) == old
    assert store.leftover_uploads() == []


@pytest.mark.parametrize(
    "reply",
    [
        Reply(400, "ExpiredToken"),
        Reply(400, "InvalidToken"),
        Reply(403, "InvalidAccessKeyId"),
        Reply(403, "SignatureDoesNotMatch"),
        Reply(403),
        Reply(401),
    ],
    ids=str,
)
def test_refused_credentials_are_named(disturbed: S3Store, proxy: Proxy, reply: Reply) -> None:
    proxy.disturb(reply, "^GET", FOREVER)

    with pytest.raises(PermissionError, match=reply.code or str(reply.status)):
        disturbed.read("a.pt")

    assert proxy.num_disturbed == 1


@pytest.mark.usefixtures("old")
@ALL_WORK
def test_missing_bucket_is_not_a_missing_file(disturbed: S3Store, proxy: Proxy, work: Work) -> None:
    proxy.disturb(Reply(404, "NoSuchBucket"), work.request, FOREVER)

    with pytest.raises(OSError, match=r"bucket \S+ does not exist") as caught:
        work.do(disturbed)

    assert not isinstance(caught.value, FileNotFoundError)
    assert proxy.num_disturbed == 1


@pytest.mark.parametrize("name", ["put", "put in parts: complete", "copy"])
def test_guard_is_asked_before_each_try(
    store: S3Store, disturbed: S3Store, proxy: Proxy, old: dict[str, bytes], name: str
) -> None:
    asked = []

    def forbid_the_second() -> None:
        asked.append("?")
        if len(asked) == 2:
            raise ForbiddenError

    write = {
        "put": lambda: disturbed.put("a.pt", [b"new"], forbid_the_second),
        "put in parts: complete": lambda: disturbed.put("a.pt", [NEW], forbid_the_second),
        "copy": lambda: disturbed.copy("run.json", "a.pt", forbid_the_second),
    }[name]
    proxy.disturb(RESET, WORK[name].request, FOREVER)

    with pytest.raises(ForbiddenError):
        write()

    assert proxy.num_disturbed == 1
    assert content(store) == old
    assert store.leftover_uploads() == []


def test_part_that_fails_for_good_stops_the_others(disturbed: S3Store, proxy: Proxy) -> None:
    proxy.disturb(Reply(403, "AccessDenied"), "partNumber=1&")

    with pytest.raises(PermissionError):
        disturbed.put("a.pt", [BIG * 12])

    assert sum("partNumber" in request for request in proxy.seen) < 12


def test_abort_that_fails_does_not_hide_the_cause(
    disturbed: S3Store, proxy: Proxy, store: S3Store
) -> None:
    proxy.disturb(Reply(403, "AccessDenied"), "partNumber=1&|^DELETE", FOREVER)

    with pytest.raises(PermissionError, match="AccessDenied"):
        disturbed.put("a.pt", [NEW])

    assert any(request.startswith("DELETE") for request in proxy.seen)
    assert [upload.name for upload in store.leftover_uploads()] == ["a.pt"]
    store.remove_leftovers()
    assert store.leftover_uploads() == []
