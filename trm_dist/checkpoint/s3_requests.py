"""Requests to S3: each is tried again while that can help, and what fails is an OSError.

botocore is called from plain threads, without s3fs. s3fs works in an event loop in the background:
what it was asked to upload is published even after its caller has been interrupted, a file left
open hangs the exit for ever, and big objects are read at a third of the speed.
"""

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import botocore.config  # type: ignore[import-untyped]
import botocore.exceptions as failures  # type: ignore[import-untyped]
import botocore.parsers  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import urllib3.exceptions

from trm_dist.checkpoint.store import Guard, unguarded

PATIENCE_S = 75.0
"""How long after the first failure of a request another try may begin."""

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0
SHORTEST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
"""Between two tries; it doubles from the one to the other."""

Answer = dict[str, Any]
T = TypeVar("T")

logger = logging.getLogger(__name__)


class RefusedError(OSError):
    """The object is not what the condition of the request says."""


class OutsideError(OSError):
    """No byte of the object lies in the range."""


class UploadGoneError(OSError):
    """The multipart upload was finished or aborted by somebody."""


class UnsupportedError(OSError):
    """The server does not know this kind of request."""


# By error code where the answer has one that says more than its HTTP status.
_KINDS: dict[str | int, tuple[type[OSError], int]] = {
    "NoSuchBucket": (OSError, errno.ENODEV),  # never taken for a file that is missing
    "NoSuchUpload": (UploadGoneError, errno.ECANCELED),
    "ConditionalRequestConflict": (RefusedError, errno.ESTALE),
    "ExpiredToken": (PermissionError, errno.EACCES),
    "InvalidToken": (PermissionError, errno.EACCES),
    "TokenRefreshRequired": (PermissionError, errno.EACCES),
    "AuthorizationHeaderMalformed": (PermissionError, errno.EACCES),
    "NotImplemented": (UnsupportedError, errno.ENOSYS),
    401: (PermissionError, errno.EACCES),
    403: (PermissionError, errno.EACCES),
    404: (FileNotFoundError, errno.ENOENT),
    412: (RefusedError, errno.ESTALE),
    416: (OutsideError, errno.ERANGE),
    501: (UnsupportedError, errno.ENOSYS),
}

_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}

_PASSING_FAILURES = (
    failures.ConnectionError,
    failures.HTTPClientError,
    failures.IncompleteReadError,
    botocore.parsers.ResponseParserError,
    urllib3.exceptions.HTTPError,
)

_FAILURES = (failures.BotoCoreError, failures.ClientError, *_PASSING_FAILURES)

_NO_CREDENTIALS = (
    failures.NoCredentialsError,
    failures.CredentialRetrievalError,
    failures.TokenRetrievalError,
    failures.UnauthorizedSSOTokenError,
)


class Requests:
    """Requests to one bucket, from any thread, also of a process forked off later."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self._client, self._process = _make_client(), os.getpid()

    @property
    def endpoint(self) -> str:
        """URL of the server in use; empty for Amazon's own, where a bucket's name is enough."""
        endpoint = str(self._client.meta.endpoint_url).rstrip("/")
        return "" if endpoint.endswith((".amazonaws.com", ".amazonaws.com.cn")) else endpoint

    def send(self, operation: str, **arguments: Any) -> Answer:
        """Make a request whose answer has no body to read; `arguments` as in `receive`."""
        return self.receive(operation, lambda answer: answer, **arguments)

    def receive(
        self,
        operation: str,
        take: Callable[[Answer], T],
        *,
        before: Guard = unguarded,
        stop: threading.Event | None = None,
        patience_s: float | None = None,
        **arguments: Any,
    ) -> T:
        """Make a request and take what is needed from its answer, until both succeed.

        Args:
            operation: A method of botocore's S3 client.
            take: Reads the body; called anew with each try's answer.
            before: Asked before each try; what it raises passes through.
            stop: Set when nobody waits for the answer any longer.
            patience_s: How long after the first failure another try may begin.
            arguments: Of the operation.

        Raises:
            OSError: It failed for good, or for too long.
        """
        stop = stop or threading.Event()
        patience_s = PATIENCE_S if patience_s is None else patience_s
        give_up_at = None
        pause_s = SHORTEST_PAUSE_S
        while True:
            before()
            try:
                return take(getattr(self._own_client(), operation)(Bucket=self.bucket, **arguments))
            except _FAILURES as error:
                give_up_at = give_up_at or time.monotonic() + patience_s
                # Spread out, so that the nodes of a run do not come back all at once.
                chosen_s = random.uniform(pause_s / 2, pause_s)
                is_late = time.monotonic() + chosen_s > give_up_at
                if not _may_pass(error) or is_late or stop.wait(chosen_s):
                    raise self._as_os_error(error, arguments.get("Key", "")) from error
                logger.info("S3 %s failed, trying again: %s", operation, error)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _own_client(self) -> Any:
        """Return the client of this process; connections must not be shared with a parent."""
        if self._process != os.getpid():
            self._client = _make_client()
            self._process = os.getpid()
        return self._client

    def _as_os_error(self, error: Exception, key: str) -> OSError:
        where = f"s3://{self.bucket}/{key}"
        if isinstance(error, _NO_CREDENTIALS):
            text = (
                f"no AWS credentials ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE, or give this machine a role"
            )
            return PermissionError(errno.EACCES, text, where)
        if not isinstance(error, failures.ClientError):
            return OSError(errno.EIO, f"{type(error).__name__}: {error}", where)
        code, status = _code(error), _status(error)
        kind, number = _KINDS.get(code) or _KINDS.get(status) or (OSError, errno.EIO)
        if code == "NoSuchBucket":
            return kind(number, f"bucket {self.bucket} does not exist; create it first", where)
        text = f"HTTP {status} {code} {error.response['Error'].get('Message', '')}"
        return kind(number, text.strip(), where)


def _make_client() -> Any:
    """Make a client from the environment and ~/.aws, like any AWS tool.

    Bodies are signed whole, and those of single uploads carry an MD5, which every server knows;
    more checksums would change nothing but speed and the number of servers that understand us. What
    is read carries a seal of its own.
    """
    config = botocore.config.Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1},  # `receive` tries again, with the body in view
        s3={"payload_signing_enabled": True},  # some buckets ask for it, beside an MD5 as well
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # botocore knows AWS_DEFAULT_REGION alone; every other AWS tool knows this one too.
    region = os.environ.get("AWS_REGION") or None
    session = botocore.session.get_session()
    return session.create_client("s3", region_name=region, config=config)


def _may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed later."""
    if isinstance(error, failures.ClientError):
        status = _status(error)
        return _code(error) in _PASSING_CODES or status == 429 or (status >= 500 and status != 501)
    return isinstance(error, _PASSING_FAILURES) and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _code(error: Any) -> str:
    return str(error.response["Error"].get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
