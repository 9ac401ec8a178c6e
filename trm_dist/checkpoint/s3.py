"""Checkpoints in S3 and whatever speaks its language.

S3 replaces one object at once or not at all, which is all that publishing needs. What is ours to
see to: a big upload is finished by the thread that asked for it, after everything else went well,
and aborted otherwise; the parts of a big read are of one version of the object, however often it
is replaced meanwhile; and an answer that got lost is not taken for a failure.
"""

import base64
import errno
import hashlib
import io
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import botocore.exceptions as failures  # type: ignore[import-untyped]

from trm_dist.checkpoint.s3_requests import (
    Answer,
    OutsideError,
    RefusedError,
    Requests,
    UnsupportedError,
    UploadGoneError,
)
from trm_dist.checkpoint.s3_transfer import (
    Span,
    Window,
    check_place,
    cut,
    discard,
    header,
    in_parallel,
    place,
    spans,
    take_head,
)
from trm_dist.checkpoint.store import HIDDEN, Entry, Guard, unguarded
from trm_dist.errors import ConfigError

_MIB = 1 << 20

FIRST_BYTES = _MIB
"""Of a read, before it is known how much there is."""
PART_BYTES = 32 * _MIB
"""Of what is sent or read in parts; a few of them are in memory."""
SINGLE_BYTES = 64 * _MIB
"""Up to here an upload is one request."""
COPY_BYTES = 5 << 30
"""Up to here S3 itself copies in one request."""
COPY_PART_BYTES = 512 * _MIB
ABORT_PATIENCE_S = 5.0

_MOST_CHANGES = 10
_MARK = "trm-dist-upload"

_NEXT_PAGE = {
    "NextContinuationToken": "ContinuationToken",
    "NextKeyMarker": "KeyMarker",
    "NextUploadIdMarker": "UploadIdMarker",
}

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that was begun and is not finished."""

    name: str
    upload_id: str
    started_s: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class _Version:
    """What an object is at one time."""

    num_bytes: int
    tag: str
    mark: str
    """Names the upload it comes from, where somebody may have to know."""


class S3Store:
    """A folder of a bucket.

    Credentials, region and endpoint are those of the AWS tools: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, ~/.aws, the machine's role.

    Raises:
        ConfigError: The URL names no bucket, or the settings cannot work.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        path = url.partition("://")[2]
        location = [part for part in path.split("/") if part]
        if not location or path.startswith("/"):
            raise ConfigError(f"{url} names no bucket. Write s3://BUCKET/DIRECTORY.")
        self._prefix = "".join(f"{part}/" for part in location[1:])
        self._has_conditions = True
        try:
            self._requests = Requests(location[0])
        except (failures.BotoCoreError, ValueError) as error:
            raise ConfigError(
                f"{url} cannot be used: {error}. Check the AWS_* variables and ~/.aws."
            ) from error
        # The server is part of it where it is not Amazon's.
        self.identity = f"s3://{'/'.join(location)}@{self._requests.endpoint}".rstrip("@")

    def entries(self, folder: str = "") -> list[Entry]:
        """List the folder, anew each time."""
        start = f"{folder}/" if folder else ""
        return [
            Entry(name, each["Size"], each["LastModified"].timestamp())
            for page in self._pages("list_objects_v2", start, Delimiter="/")
            for each in page.get("Contents", [])
            if (name := self._name(each["Key"]).removeprefix(start))
        ]

    def read(self, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Read a range of one version of an object."""
        return bytes(_settled(name, lambda: self._read_version(name, start, num_bytes)[0]))

    def view(self, name: str) -> memoryview:
        """Read a whole object."""
        return _settled(name, lambda: self._read_version(name, 0, None)[0])

    def put(
        self, name: str, pieces: Sequence[bytes | memoryview], guard: Guard = unguarded
    ) -> None:
        """Upload in one request, or in parallel parts of which a few are in memory at a time."""
        views = [memoryview(piece).cast("B") for piece in pieces]
        num_bytes = sum(map(len, views))
        if num_bytes <= SINGLE_BYTES:
            self._put_object(name, cut(views, (0, num_bytes)), before=guard)
            return

        def send(span: Span, **part: Any) -> Answer:
            return self._send("upload_part", name, Body=cut(views, span), **part)

        self._upload(name, spans(0, num_bytes, PART_BYTES), send, guard)

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Compare, and let the server make sure that nothing changes until it has written."""
        try:
            current, tag = _settled(name, lambda: self._read_version(name, 0, None))
        except FileNotFoundError:
            current, tag = None, ""
        if current != expected:
            return False
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        mark = secrets.token_hex(16)
        put = partial(self._put_object, name, bytearray(data), Metadata={_MARK: mark})
        try:
            put(**condition if self._has_conditions else {})
        except (RefusedError, FileNotFoundError):
            # Refused is also the second try of one that was done and whose answer got lost.
            return self._is_marked(name, mark)
        except UnsupportedError:
            logger.warning("%s cannot write on a condition: start one training at once", self.url)
            self._has_conditions = False
            put()
        return True

    def copy(self, source: str, target: str, guard: Guard = unguarded) -> None:
        """Let the server copy one version of an object."""
        _settled(source, lambda: self._copy_version(source, target, guard))

    def delete(self, name: str) -> None:
        """Remove an object."""
        with suppress(FileNotFoundError):
            self._send("delete_object", name)

    def leftovers(self) -> list[str]:
        """Name the unfinished uploads, by what they would have become."""
        return [upload.name for upload in self.leftover_uploads()]

    def remove_leftovers(self) -> None:
        """Abort the uploads that nobody will finish."""
        try:
            for upload in self.leftover_uploads():
                self.abort_upload(upload)
        except OSError as error:
            logger.warning("unfinished uploads to %s could not be removed: %s", self.url, error)

    def leftover_uploads(self) -> list[Upload]:
        """List the unfinished uploads to this folder; those of a living writer are among them."""
        return [
            Upload(name, each["UploadId"], each["Initiated"].timestamp())
            for page in self._pages("list_multipart_uploads")
            for each in page.get("Uploads", [])
            if "/" not in (name := self._name(each["Key"])).removeprefix(f"{HIDDEN}/")
        ]

    def abort_upload(self, upload: Upload) -> None:
        """Let go what an upload has stored so far; one that is already gone is fine."""
        with suppress(UploadGoneError):
            self._send("abort_multipart_upload", upload.name, UploadId=upload.upload_id)

    def check_writable(self) -> None:
        """Write a small object and remove it."""
        name = f"{HIDDEN}/check-{secrets.token_hex(8)}"
        self.put(name, [b"Can this be written?"])
        self.delete(name)

    def free_bytes(self) -> int | None:
        """Return None: a bucket is never full."""
        return None

    def _send(self, operation: str, name: str, **arguments: Any) -> Answer:
        return self._requests.send(operation, Key=self._prefix + name, **arguments)

    def _put_object(self, name: str, body: bytearray, **arguments: Any) -> None:
        """Upload in one request, which the server must refuse unless all of the body arrives.

        The hash in the signature is not enough for that: SeaweedFS makes an empty object of a
        request that breaks off after its head. Parts need no more than their signature, as an
        upload is finished with the tags of those that were answered.
        """
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        whole = {"Body": body, "ContentMD5": base64.b64encode(digest).decode()}
        self._send("put_object", name, **whole, **arguments)

    def _get(self, take: Callable[[Answer], T], name: str, **arguments: Any) -> T:
        return self._requests.receive("get_object", take, Key=self._prefix + name, **arguments)

    def _name(self, key: str) -> str:
        return key.removeprefix(self._prefix)

    def _pages(self, operation: str, start: str = "", **arguments: Any) -> Iterator[Answer]:
        arguments["Prefix"] = self._prefix + start
        while True:
            page = self._requests.send(operation, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments |= {ask: page[told] for told, ask in _NEXT_PAGE.items() if page.get(told)}

    def _version(self, name: str) -> _Version:
        """Look an object up; if possible not by HEAD, whose errors do not say what is wrong."""
        try:
            answer = self._get(discard, name, Range="bytes=0-0")
        except OutsideError:
            answer = self._send("head_object", name)
        mark = answer.get("Metadata", {}).get(_MARK, "")
        return _Version(place(answer)[1], answer["ETag"], mark)

    def _is_marked(self, name: str, mark: str) -> bool:
        try:
            return self._version(name).mark == mark
        except FileNotFoundError:
            return False

    def _read_version(self, name: str, start: int, num_bytes: int | None) -> tuple[memoryview, str]:
        """Read a range into memory that may be written to; and the tag of the version it is of."""
        most = FIRST_BYTES if num_bytes is None else min(num_bytes, FIRST_BYTES)
        asked = header((start, start + max(most, 1))) if start >= 0 else f"bytes={start}"
        try:
            head, answer = self._get(partial(take_head, most), name, Range=asked)
        except OutsideError:
            version = self._version(name)
            if version.num_bytes > max(start, 0):
                raise RefusedError(errno.ESTALE, "replaced while it was read") from None
            return memoryview(b""), version.tag
        first, size = place(answer)
        check_place(answer, (start if start >= 0 else max(0, size + start), size))
        end = size if num_bytes is None else min(size, first + num_bytes)
        if first + len(head) == end:
            return memoryview(bytearray(head)), answer["ETag"]
        # Zeros that cost nothing until they are written over.
        view = io.BytesIO(bytes(end - first)).getbuffer()
        view[: len(head)] = head
        self._read_parts(name, view, (first + len(head), end), answer)
        return view, answer["ETag"]

    def _read_parts(self, name: str, view: memoryview, span: Span, answer: Answer) -> None:
        """Read the end of a range into the end of the memory for it."""
        size, tag = place(answer)[1], answer["ETag"]
        parts = spans(*span, PART_BYTES)
        windows = [
            Window(view[first - span[1] + len(view) :][: end - first], first, size, tag)
            for first, end in parts
        ]

        def fetch(index: int, stop: threading.Event) -> None:
            asked = {"Range": header(parts[index]), "IfMatch": tag}
            self._get(windows[index].take, name, stop=stop, **asked)

        def report() -> None:
            missing = span[1] - span[0] - sum(window.filled for window in windows)
            done = (len(view) - missing) // _MIB
            logger.info("reading %s: %d of %d MiB", name, done, len(view) // _MIB)

        in_parallel(fetch, len(parts), report)

    def _copy_version(self, source: str, target: str, guard: Guard) -> None:
        version = self._version(source)
        origin = {
            "CopySource": {"Bucket": self._requests.bucket, "Key": self._prefix + source},
            "CopySourceIfMatch": version.tag,
        }
        if version.num_bytes <= COPY_BYTES:
            self._send("copy_object", target, before=guard, **origin)
            return

        def send(span: Span, **part: Any) -> Answer:
            asked = {"CopySourceRange": header(span), **origin, **part}
            answer: Answer = self._send("upload_part_copy", target, **asked)["CopyPartResult"]
            return answer

        self._upload(target, spans(0, version.num_bytes, COPY_PART_BYTES), send, guard)

    def _upload(
        self, name: str, parts: Sequence[Span], send: Callable[..., Answer], guard: Guard
    ) -> None:
        """Make an object of parts; if that fails, leave nothing of them behind."""
        mark = secrets.token_hex(16)
        created = self._send("create_multipart_upload", name, Metadata={_MARK: mark})
        upload = {"UploadId": created["UploadId"]}

        def send_part(index: int, stop: threading.Event) -> dict[str, Any]:
            number = {"PartNumber": index + 1}
            return {"ETag": send(parts[index], stop=stop, **number, **upload)["ETag"], **number}

        try:
            done = {"Parts": in_parallel(send_part, len(parts))}
            self._complete(name, mark, before=guard, MultipartUpload=done, **upload)
        except BaseException:
            with suppress(Exception):
                patience = {"patience_s": ABORT_PATIENCE_S}
                self._send("abort_multipart_upload", name, **patience, **upload)
            raise

    def _complete(self, name: str, mark: str, **arguments: Any) -> None:
        try:
            self._send("complete_multipart_upload", name, **arguments)
        except UploadGoneError:
            if not self._is_marked(name, mark):  # else it was done, and the answer got lost
                raise


def _settled(name: str, work: Callable[[], T]) -> T:
    """Do again what another version of an object came between."""
    for _ in range(_MOST_CHANGES):
        with suppress(RefusedError):
            return work()
    raise OSError(errno.EBUSY, "replaced again and again while it was read", name)
