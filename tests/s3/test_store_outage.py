"""The server goes away and comes back, or never was there, or lets nobody in."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.contract import content
from tests.s3.proxy import Proxy
from tests.s3.server import BUCKET, Server
from trm_dist.checkpoint import s3_requests
from trm_dist.checkpoint.s3 import S3Store
from trm_dist.errors import ConfigError

MIB = 1 << 20

WORK: dict[str, Callable[[S3Store], object]] = {
    "entries": lambda store: store.entries(),
    "read": lambda store: store.read("a.pt"),
    "put": lambda store: store.put("a.pt", [b"new"]),
    "put in parts": lambda store: store.put("a.pt", [bytes(70 * MIB)]),
    "put_if": lambda store: store.put_if("a.pt", b"new", None),
    "copy": lambda store: store.copy("a.pt", "b.pt"),
    "delete": lambda store: store.delete("a.pt"),
    "check_writable": lambda store: store.check_writable(),
    "leftover_uploads": lambda store: store.leftover_uploads(),
}

ALL_WORK = pytest.mark.parametrize("work", WORK.values(), ids=WORK)


@pytest.fixture
def restarted(server: Server) -> Iterator[Server]:
    """A server that may be killed; it is there again for the next test."""
    yield server
    if not server.is_running:
        server.start()


def big(seed: int) -> list[bytes]:
    """200 MiB of which no two are alike."""
    return [bytes([seed, index % 256, index // 256, 7]) * (MIB // 4) for index in range(200)]


def test_upload_goes_on_after_an_outage(
    store: S3Store,
    disturbed: S3Store,
    proxy: Proxy,
    restarted: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_requests, "PATIENCE_S", 60.0)
    store.put("a.pt", big(1))

    is_busy = threading.Event()
    proxy.meanwhile("partNumber=4&", is_busy.set)
    upload = threading.Thread(target=disturbed.put, args=("a.pt", big(2)))

    upload.start()
    assert is_busy.wait(30)
    restarted.kill()
    time.sleep(1)
    assert upload.is_alive()
    restarted.start()
    upload.join()

    assert store.read("a.pt") == b"".join(big(2))
    assert store.leftover_uploads() == []


@pytest.mark.usefixtures("impatience")
def test_upload_that_met_a_lasting_outage_leaves_the_old_content(
    store: S3Store, disturbed: S3Store, proxy: Proxy, restarted: Server
) -> None:
    store.put("a.pt", big(1))
    proxy.meanwhile("partNumber=4&", restarted.kill)

    with pytest.raises(OSError, match="Connection"):
        disturbed.put("a.pt", big(2))

    restarted.start()
    assert store.read("a.pt") == b"".join(big(1))
    assert [upload.name for upload in store.leftover_uploads()] == ["a.pt"]
    store.remove_leftovers()
    assert store.leftover_uploads() == []


def test_what_was_put_survives_the_death_of_the_server(store: S3Store, restarted: Server) -> None:
    store.put("a.pt", [b"small"])
    store.put("b.pt", big(1))
    restarted.kill()
    restarted.start()

    assert content(store) == {"a.pt": b"small", "b.pt": b"".join(big(1))}


@pytest.mark.usefixtures("impatience")
@ALL_WORK
def test_server_that_is_not_there_is_named(
    url: str, work: Callable[[S3Store], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")

    with pytest.raises(OSError, match=r"Could not connect.*http://127\.0\.0\.1:1/") as caught:
        work(S3Store(url))

    assert not isinstance(caught.value, FileNotFoundError | PermissionError)


@ALL_WORK
def test_missing_bucket_is_named(work: Callable[[S3Store], object]) -> None:
    with pytest.raises(OSError, match="bucket no-such-bucket does not exist") as caught:
        work(S3Store("s3://no-such-bucket/run"))

    assert not isinstance(caught.value, FileNotFoundError)


@ALL_WORK
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_a_permission_error(
    url: str, work: Callable[[S3Store], object], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong")

    with pytest.raises(PermissionError, match=r"InvalidAccessKeyId|SignatureDoesNotMatch"):
        work(S3Store(url))


@ALL_WORK
def test_missing_credentials_are_a_permission_error_that_helps(
    url: str, work: Callable[[S3Store], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID"):
        work(S3Store(url))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", ""),
        ("AWS_PROFILE", "nobody"),
        ("AWS_ENDPOINT_URL", "nonsense"),
        ("AWS_REGION", "no region"),
    ],
)
def test_settings_that_cannot_work_are_a_config_error(
    url: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigError, match=url):
        S3Store(url)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_endpoint_comes_from_the_environment(
    url: str, variable: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, server.endpoint)

    assert S3Store(url).entries() == []


def test_identity_is_the_same_however_it_is_spelled(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{BUCKET}/a/b"
    spelled = [f"s3://{location}", f"s3://{location}/", f"s3a://{BUCKET}//a/b"]
    ours = {S3Store(url).identity for url in spelled}
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint + "/")
    ours.add(S3Store(spelled[0]).identity)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    amazon = S3Store(spelled[0]).identity

    assert ours == {f"s3://{location}@{server.endpoint}"}
    assert amazon == f"s3://{location}"
