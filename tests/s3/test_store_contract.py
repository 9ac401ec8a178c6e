"""The contract on a real S3 server, and what S3 adds to it."""

import pytest

from tests.contract import StoreContract
from trm_dist.checkpoint import s3
from trm_dist.checkpoint.s3 import S3Store


class TestS3Store(StoreContract):
    """As it is; the fixture `store` is that of conftest."""


@pytest.mark.usefixtures("small_parts")
class TestS3StoreInParts(StoreContract):
    """The same where nothing fits into one request."""


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9, 10, -1, -4, -10, -11])
@pytest.mark.parametrize("num_bytes", [None, 1, 3, 4, 7, 8, 99])
def test_read_joins_parts_of_any_size(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, start: int, num_bytes: int | None
) -> None:
    monkeypatch.setattr(s3, "FIRST_BYTES", 3)
    monkeypatch.setattr(s3, "PART_BYTES", 2)
    store.put("a.pt", [b"0123456789"])

    expected = b"0123456789"[start:]
    assert store.read("a.pt", start, num_bytes) == expected[:num_bytes]
