"""The trainer's end of the persister: start or adopt it, hand it snapshots, hear of commits.

A persister that dies is started again with what it had not finished; the trainer never notices.
"""

import json
import logging
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import blake2b
from typing import IO, Any

from trm_dist.checkpoint.journal import Journal
from trm_dist.checkpoint.memory import Slots, reopened
from trm_dist.checkpoint.persister import MAX_MESSAGE_BYTES
from trm_dist.checkpoint.runs import Run, new_writer
from trm_dist.errors import FencedError

logger = logging.getLogger(__name__)

START_S = 30.0
"""How long a new persister may take until it listens."""

_TELL_EVERY_S = 10.0
_POLL_S = 0.01
_MEND_EVERY_S = 5.0
_MOST_STARTS = 5


class PersisterClient:
    """A connection that mends itself."""

    def __init__(self, url: str, identity: str, guardian: int) -> None:
        """Name the persister; nothing is started yet.

        Args:
            url: Of the store.
            identity: Of the store; there is one persister for each on a node, or in each container
                of it.
            guardian: Process after whose end nobody will adopt the persister any more.
        """
        # Containers may share the network, and so this name; the same path is another place there.
        spaces = [os.readlink(f"/proc/self/ns/{each}") for each in ("mnt", "pid")]
        owner = " ".join([str(os.getuid()), *spaces, identity])
        name = blake2b(owner.encode(), digest_size=8).hexdigest()
        self._address = f"trm_dist-persister-{name}"
        self._url, self._guardian = url, guardian
        self._trainer = secrets.token_hex(8)
        """Tells a start that connects again from the next one."""
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._opening: dict[str, Any] = {}
        self._slots: Slots | None = None
        self._journal: Journal | None = None
        self._asked: list[dict[str, Any]] = []
        self._mend_at_s = 0.0
        self._is_opening = False
        """Whether a new persister has not said yet that it is the writer."""
        self._num_mends = 0
        """Since a persister has last said so."""
        self._remind_at_s = 0.0
        self._fenced: FencedError | None = None
        self._complaints: IO[bytes] | None = None
        """What a persister of ours says before it dies; nobody else would hear it."""

    def open(
        self, run: Run, *, deadline_s: float, keep_last: int, keep_every: int, launch_id: str = ""
    ) -> Run:
        """Become the only writer of a run.

        Returns:
            The run with the generation that is ours now.

        Raises:
            OSError: The store cannot be written, or no persister could be started.
        """
        self._opening = {
            "do": "open", "is_mending": False, "url": self._url,
            "trainer": self._trainer, "run": asdict(run), "writer": new_writer(launch_id),
            "guardian": self._guardian,
            "deadline_s": deadline_s, "keep_last": keep_last, "keep_every": keep_every,
        }  # fmt: skip
        run = self._start()
        # From now on it is ours to go on with, and not to be taken from somebody newer.
        self._opening |= {"run": asdict(run), "writer": run.writer, "is_mending": True}
        return run

    def attach(self, slots: Slots, journal: Journal) -> list[dict[str, Any]]:
        """Let snapshots be published from these slots, and a copy of the journal be kept.

        Returns:
            Jobs of the trainer before, in the same slots, that are still at work.
        """
        self._slots, self._journal = slots, journal
        try:
            busy = self._attach()
        except ConnectionError:
            self._start()
            return []
        self._asked += busy
        return busy

    def publish(
        self, slot: int, sequence: int, names: list[str], *, is_urgent: bool = False
    ) -> None:
        """Ask for a snapshot to be published; its slot stays as it is until it is committed.

        Raises:
            FencedError: Another writer has taken over.
        """
        self._refuse_if_fenced()
        job = {"slot": slot, "sequence": sequence, "names": names, "is_urgent": is_urgent}
        self._asked.append(job)
        if self._socket is not None and not self._is_opening:
            try:
                self._send({"do": "publish"} | job)
            except OSError:
                self._mend()

    def events(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Return what became of jobs, waiting a while for the first.

        Raises:
            FencedError: Another writer has taken over.
        """
        found: list[dict[str, Any]] = []
        self._refuse_if_fenced()
        if self._socket is None and time.monotonic() < self._mend_at_s:
            time.sleep(min(wait_s, self._mend_at_s - time.monotonic()))
            return found
        try:
            if self._socket is None:
                raise ConnectionError("it could not be started")
            self._hear(found, wait_s)
        except OSError:
            found += self._mend()
        for each in found:
            if each["is"] == "committed":
                self._asked = [
                    job for job in self._asked
                    if (job["slot"], job["sequence"]) != (each["slot"], each["sequence"])
                ]  # fmt: skip
        return found

    def _hear(self, found: list[dict[str, Any]], wait_s: float) -> None:
        """Add what the persister tells, waiting a while for the first."""
        while self._socket is not None:  # until it refuses
            message = self._receive(0.0 if found else wait_s)
            if message is None:
                self._remind()
                return
            if self._is_opening:
                found += self._hear_opening(message)
            elif message["is"] != "kept":  # which nobody waits for any more
                found.append(message)

    def keep_journal(self, wait_s: float) -> None:
        """Have the copy of the journal brought up to date, waiting a while for it.

        For the end: what became of jobs meanwhile is not told any more.
        """
        deadline = time.monotonic() + wait_s
        try:
            if self._socket is not None:
                self._send({"do": "keep"})
            while self._socket is not None and (left_s := deadline - time.monotonic()) > 0:
                message = self._receive(left_s)
                if message and message["is"] == "kept":
                    return
        except (OSError, FencedError):
            return

    def close(self) -> None:
        """Tell the persister that nothing is left to do."""
        if self._socket is not None:
            with suppress(OSError):
                self._send({"do": "bye"})
            self._disconnect()
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None

    # -- the connection ----------------------------------------------------------------------------

    def _refuse_if_fenced(self) -> None:
        """Never connect again once somebody has taken over: that would stop the newer one."""
        if self._fenced:
            raise self._fenced

    def _disconnect(self) -> None:
        self._is_opening = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> None:
        self._disconnect()
        deadline = time.monotonic() + START_S
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(f"\0{self._address}")
                if _peer(connection)[1] != os.getuid():
                    connection.close()
                    raise PermissionError("somebody else listens where the persister should")
                self._socket = connection
                return
            except ConnectionRefusedError:
                connection.close()
            if self._process is None or self._process.poll() is not None:
                if self._complaints is None:
                    self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 until close
                module = ["-m", "trm_dist.checkpoint.persister", self._address, str(os.getpid())]
                self._process = subprocess.Popen(  # noqa: S603 our own module
                    [sys.executable, *module],
                    # A pipe that it held open would keep the reader of torchrun's output waiting.
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._complaints,
                    start_new_session=True,
                )  # fmt: skip
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no persister could be started within {START_S:.0f} s")
            time.sleep(_POLL_S)

    def _open(self) -> Run:
        self._send(self._opening)
        answer = self._answer("opened", "refused")
        if answer["is"] == "refused":
            raise OSError(*answer["cause"])  # of its own kind, which tells whether it may pass
        return Run(**answer["run"])

    def _attach(self) -> list[dict[str, Any]]:
        assert self._slots is not None, "known"
        assert self._journal is not None, "known"
        assert self._socket is not None, "connected"
        descriptor = reopened(self._slots)
        message = json.dumps({"do": "attach", "journal": self._journal.name}).encode()
        try:
            socket.send_fds(self._socket, [message], [descriptor, self._journal.descriptor])
        finally:
            os.close(descriptor)
        busy: list[dict[str, Any]] = self._answer("attached")["busy"]
        return busy

    def _start(self) -> Run:
        """Connect, open, attach and ask for everything again that is not committed."""
        for _ in range(_MOST_STARTS):
            try:
                self._connect()
                run = self._open()
                self._ask_again()
                return run
            except ConnectionError:  # it was about to end
                continue
        raise OSError(f"the persister ends again and again{self._complaint()}")

    def _ask_again(self) -> None:
        """Attach to a persister that has opened, and ask for all that is not committed."""
        if self._slots is not None:
            self._attach()
        for job in self._asked:
            self._send({"do": "publish"} | job)

    def _mend(self) -> list[dict[str, Any]]:
        """Start over after the persister has ended; a store that refuses now is tried again.

        The new one asks the store whether it may write, which takes long when the store is away.
        Its answer comes with the events, so that training goes on meanwhile.

        Raises:
            FencedError: That was its last word; connecting again would fence the newer trainer.
        """
        self._hear_last_words()
        complaint = self._complaint()
        logger.warning("the persister is gone and is replaced%s", complaint)
        try:
            if self._num_mends == _MOST_STARTS:
                raise OSError(f"the persister ends again and again{complaint}")
            self._num_mends += 1
            self._connect()
            self._send(self._opening)
        except OSError as error:
            return self._put_off(str(error))
        self._is_opening = True
        self._remind_at_s = time.monotonic() + _TELL_EVERY_S
        return []

    def _hear_opening(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Hear whether a new persister is the writer; what became of jobs before is old news."""
        if message["is"] == "refused":
            return self._put_off(message["error"])
        if message["is"] == "opened":
            self._is_opening, self._num_mends = False, 0
            self._ask_again()
        return []

    def _put_off(self, error: str) -> list[dict[str, Any]]:
        """Let go, and start over a little later; return the event of that."""
        self._disconnect()
        self._num_mends = 0
        self._mend_at_s = time.monotonic() + _MEND_EVERY_S
        failed = {"is": "failed", "error": error, "num_failures": 1}
        return [failed | {"retry_in_s": _MEND_EVERY_S}]

    def _remind(self) -> None:
        """Tell every now and then that a new persister has not answered yet."""
        if self._is_opening and time.monotonic() >= self._remind_at_s:
            self._remind_at_s = time.monotonic() + _TELL_EVERY_S
            self._tell_busy()

    def _hear_last_words(self) -> None:
        """Read what still lies in the socket; an error of the connection comes before it."""
        for _ in range(2):
            with suppress(ConnectionError):
                while self._socket is not None and self._receive(0.0):
                    pass

    def _complaint(self) -> str:
        if self._complaints is None:
            return ""
        self._complaints.seek(0)
        said = self._complaints.read().decode(errors="replace").strip()
        self._complaints.truncate(0)
        return f": {said.splitlines()[-1]}" if said else ""

    def _send(self, content: Mapping[str, Any]) -> None:
        assert self._socket is not None, "connected"
        self._socket.send(json.dumps(content).encode())

    def _receive(self, wait_s: float) -> dict[str, Any] | None:
        """Return the next message; None if none comes in time.

        Raises:
            ConnectionError: The persister has ended.
        """
        assert self._socket is not None, "connected"
        if not select.select([self._socket], [], [], wait_s)[0]:
            return None
        data = self._socket.recv(MAX_MESSAGE_BYTES)
        if not data:
            raise ConnectionError("the persister has ended")
        message: dict[str, Any] = json.loads(data)
        if message["is"] == "fenced":
            self._fenced = FencedError(message["error"], message["by"])
            self._refuse_if_fenced()
        return message

    def _tell_busy(self) -> None:
        """Tell that we wait for it, and let it go on if somebody has stopped it by a signal."""
        logger.warning("waiting for the persister, which is busy with %s", self._url)
        assert self._socket is not None, "connected"
        with suppress(ProcessLookupError):
            os.kill(_peer(self._socket)[0], signal.SIGCONT)

    def _answer(self, *kinds: str) -> dict[str, Any]:
        """Wait for an answer of these kinds; what became of jobs before it is old news."""
        while True:
            message = self._receive(_TELL_EVERY_S)
            if message is None:
                self._tell_busy()
            elif message["is"] in kinds:
                return message


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Return process, user and group at the other end."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process, user, group = struct.unpack("3i", found)
    return process, user, group
