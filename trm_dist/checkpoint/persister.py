"""The persister: a process of its own that publishes snapshots from shared memory.

One for each store on a node. It is in no worker's process group and dies with none: an upload in
flight goes on while torchrun restarts the workers, and the next writer there adopts it. When its
trainer dies it publishes the newest snapshot by itself. It ends when it is told to, or when there
is nothing left to do and nobody left to come back.

It listens on an abstract socket, whose name is free again the moment it ends, however it ends.
Messages are JSON, one a packet:

    {"do": "open", "url", "run", "guardian", ...}      -> {"is": "opened", "generation"}
    {"do": "attach", "journal": name} with the descriptors of the slots and of the journal
                                                       -> {"is": "attached", "busy": [slots]}
    {"do": "publish", "slot", "sequence", "names"}     -> {"is": "committed" | "failed" | "fenced"}
    {"do": "keep"} the journal                         -> {"is": "kept"}
    {"do": "bye"}
"""

import asyncio
import errno
import json
import os
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from trm_dist.checkpoint.archive import plain
from trm_dist.checkpoint.journal import Journal
from trm_dist.checkpoint.memory import Slots, remove_if_unlocked
from trm_dist.checkpoint.runs import Run, claim, read_run, record_again
from trm_dist.checkpoint.store import Store, open_store
from trm_dist.checkpoint.writer import Writer
from trm_dist.errors import FencedError

MAX_MESSAGE_BYTES = 1 << 17
FIRST_CLIENT_S = 30.0
"""How long a new persister waits for whoever has started it."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

_NICENESS = 10
"""Training comes first: on a node without a spare core it is slowed down less."""


@dataclass(eq=False, slots=True)
class Job:
    """One snapshot to publish; it keeps the writer and the slots it was asked of."""

    writer: Writer
    slots: Slots
    slot: int
    sequence: int
    names: list[str]
    is_urgent: bool = False

    def describe(self) -> dict[str, Any]:
        """Say which job it is."""
        return {
            "slot": self.slot, "sequence": self.sequence, "names": self.names,
            "is_urgent": self.is_urgent,
        }  # fmt: skip


class Persister:
    """The state of the process: a client at most, a queue of jobs, and whom it waits for."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._client: socket.socket | None = None
        self._opened_by: socket.socket | None = None
        self._trainer = ""
        """Who has opened; one that connects again is the same."""
        self._replaced: list[socket.socket] = []
        """Clients before it, which hear of it once it has said who it is."""
        self._guardian: int | None = None
        self._deadline_s = 0.0
        self._opening: asyncio.Task[None] | None = None  # the loop itself keeps no task alive
        self._recording: asyncio.Task[None] | None = None
        self._writer: Writer | None = None
        self._slots: Slots | None = None
        self._published = 0
        self._journals: list[Journal] = []
        """Of this trainer, the last; and of those before it that are not kept yet."""
        self._is_keeping = False
        self._num_keeps = 0
        self._awaits_keep = False
        """Whether the client has asked for the copy of its journal, and must hear of it."""
        self._jobs: list[Job] = []
        self._running: Job | None = None
        self._wake = asyncio.Event()
        self._storing = asyncio.Lock()
        self._ended = asyncio.Event()

    async def run(self, starter: int) -> None:
        """Serve until there is nothing and nobody left.

        Args:
            starter: Process that has started this one; should it die, nobody will come.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener, self._accept)
        self._watch(starter)
        loop.call_later(FIRST_CLIENT_S, self._stop_waiting)
        if os.getppid() != starter:  # it is gone, and its number may be another's by now
            self._stop_waiting()
        working = asyncio.create_task(self._work())
        ending = asyncio.create_task(self._ended.wait())
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()

    def _stop_waiting(self) -> None:
        """End unless somebody has come."""
        if self._client is None and self._writer is None:
            self._forget_guardian()
            self._end_if_done()

    # -- the client --------------------------------------------------------------------------------

    def _accept(self) -> None:
        """Serve a new client; the older one is told that it has been replaced."""
        client, _ = self._listener.accept()
        user = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if user != os.getuid():
            client.close()
            return
        if self._client is not None:
            asyncio.get_running_loop().remove_reader(self._client)
            self._replaced.append(self._client)
            self._awaits_keep = False
        self._client = client
        asyncio.get_running_loop().add_reader(client, self._receive, client)

    def _dismiss_replaced(self, by: str) -> None:
        """Tell the clients before who has replaced them."""
        error = "another trainer on this node has taken over the run; this one stops"
        for each in self._replaced:
            with suppress(OSError):  # it is gone
                each.send(json.dumps({"is": "fenced", "error": error, "by": by}).encode())
            each.close()
        self._replaced.clear()

    def _receive(self, client: socket.socket) -> None:
        try:
            message, descriptors, *_ = socket.recv_fds(client, MAX_MESSAGE_BYTES, 2)
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._hang_up()
            self._publish_what_is_left()
            self._keep_soon()
            self._end_if_done()
            return
        content = json.loads(message)
        match content.pop("do"):
            case "open":
                self._dismiss_replaced(content["writer"])
                self._opening = asyncio.create_task(self._open(**content))
            case "attach":
                self._attach(Slots(descriptors[0]), Journal(content["journal"], descriptors[1]))
            case "publish":
                assert self._writer is not None, "opened"
                assert self._slots is not None, "attached"
                self._jobs.append(Job(self._writer, self._slots, **content))
                self._wake.set()
            case "keep":
                self._awaits_keep = True
                self._keep_soon()
            case "bye":
                self._hang_up()
                self._forget_guardian()
                self._keep_soon()
                self._end_if_done()

    async def _open(  # noqa: PLR0913 the fields of a message
        self, *, url: str, trainer: str, run: dict[str, Any], writer: str, guardian: int,
        deadline_s: float, keep_last: int, keep_every: int, is_mending: bool,
    ) -> None:  # fmt: skip
        """Become the writer of a run, unless we are it already."""
        client = self._client
        self._deadline_s = deadline_s
        claimed = self._writer.run if self._writer else None
        try:
            store = await asyncio.to_thread(open_store, url)
            if claimed and not claimed.is_that_of(run):
                claimed = None
            if claimed is not None:
                claimed = await asyncio.to_thread(_as_recorded, store, claimed)
            if claimed is None:
                self._jobs.clear()  # of a run that nobody wants any more
                async with self._storing:
                    claimed = await asyncio.to_thread(
                        claim, store, Run(**run), writer, is_mending=is_mending
                    )
                    await asyncio.to_thread(store.remove_leftovers)
            else:  # recorded for the next writer, as soon as it can be
                is_next = trainer != self._trainer
                start = claimed.again if is_next else claimed.planned_again
                claimed = start(int(run["starts_at"]))
                self._recording = asyncio.create_task(self._record(store, claimed))
            self._writer = Writer(store, claimed, keep_last=keep_last, keep_every=keep_every)
            self._opened_by, self._trainer = client, trainer
        except Exception as error:  # noqa: BLE001 whatever it is, the client must hear of it
            if client is self._client:
                kind = "fenced" if isinstance(error, FencedError) else "refused"
                by, text = getattr(error, "by", ""), str(error) or repr(error)
                self._tell({"is": kind, "error": text, "by": by, "cause": _cause(error, text)})
            return
        if client is not self._client:  # it has gone, and another one asks for itself
            return
        self._watch(guardian)
        self._tell({"is": "opened", "run": asdict(claimed)})

    async def _record(self, store: Store, run: Run) -> None:
        """Record what a start counts; one after another, so that the newest stays."""
        async with self._storing:
            with suppress(OSError):
                await asyncio.to_thread(record_again, store, run)

    def _attach(self, slots: Slots, journal: Journal) -> None:
        """Publish from these slots from now on; they may be those of the trainer before."""
        self._journals.append(journal)
        old = self._slots
        if old is not None and os.path.sameopenfile(old.descriptor, slots.descriptor):
            os.close(slots.descriptor)
            busy = [job.describe() for job in self._jobs]
        else:
            self._slots, self._published, busy = slots, 0, []
        self._tell({"is": "attached", "busy": busy})

    def _tell(self, content: dict[str, Any]) -> None:
        if self._client is not None:
            with suppress(OSError):  # it is gone, which its end of the socket will say
                self._client.send(json.dumps(content).encode())

    def _tell_of(self, job: Job, content: dict[str, Any]) -> None:
        """Tell what became of a job; those of other slots may have the same numbers."""
        if job.slots is self._slots:
            self._tell(job.describe() | content)

    def _hang_up(self) -> None:
        if self._client is not None:
            asyncio.get_running_loop().remove_reader(self._client)
            self._client.close()
            self._client = None
            self._awaits_keep = False
        while self._replaced:  # by one that has left without a word: they connect again
            self._replaced.pop().close()

    # -- whom we wait for --------------------------------------------------------------------------

    def _watch(self, guardian: int) -> None:
        """Learn when a process has ended, through a descriptor of it."""
        self._forget_guardian()
        with suppress(OSError):  # it has ended
            self._guardian = os.pidfd_open(guardian)
            asyncio.get_running_loop().add_reader(self._guardian, self._lose_guardian)

    def _forget_guardian(self) -> None:
        if self._guardian is not None:
            asyncio.get_running_loop().remove_reader(self._guardian)
            os.close(self._guardian)
            self._guardian = None

    def _lose_guardian(self) -> None:
        self._forget_guardian()
        self._end_if_done()

    def _is_done(self) -> bool:
        return self._client is None and self._guardian is None and not self._jobs

    def _end_if_done(self) -> None:
        if self._is_done() and not self._is_keeping:
            self._ended.set()

    def _publish_what_is_left(self) -> None:
        """Publish the newest snapshot of a trainer that is gone."""
        newest = self._slots.newest() if self._slots else None
        if newest is None or self._slots is None or self._writer is None:
            return
        if not self._writer.run.is_that_of(plain(json.loads(newest.header)["tree"])["run"]):
            return  # the trainer has died before its first capture
        known = max([self._published, *(job.sequence for job in self._jobs)])
        if newest.sequence > known:
            # What is older has nothing more to give, unless it has a name of its own to get.
            self._jobs = [each for each in self._jobs if each.names or each is self._running]
            job = Job(self._writer, self._slots, newest.slot, newest.sequence, [], is_urgent=True)
            self._jobs.append(job)
            self._wake.set()

    # -- the work ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Publish job after job; one that fails is tried again after a pause."""
        num_failures, failing_since_s = 0, 0.0
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            if not self._jobs:
                if self._is_keeping:
                    await self._keep_now()
                else:
                    await self._wake.wait()
                continue
            job = next((each for each in self._jobs if each.is_urgent), self._jobs[0])
            self._running = job
            try:
                await self._publish(job)
                num_failures = 0
                await self._keep_journals(job.writer.store)
                continue
            except FencedError as error:
                is_left = self._opened_by is not self._client or job.writer is not self._writer
                if self._client is not None and is_left:
                    # Left by the trainer before; the one that is there now goes on as a newer one.
                    self._jobs = [each for each in self._jobs if each.writer is not job.writer]
                    continue
                self._tell({"is": "fenced", "error": str(error), "by": error.by})
                await self._keep_journals(job.writer.store)
                self._ended.set()
                return
            except Exception as error:  # noqa: BLE001 any failure of a store is tried again
                failing_since_s = failing_since_s if num_failures else loop.time()
                pause_s = min(FIRST_PAUSE_S * 2**num_failures, LONGEST_PAUSE_S)
                num_failures += 1
                self._tell_of(job, {
                    "is": "failed", "error": str(error) or repr(error),
                    "num_failures": num_failures, "retry_in_s": pause_s,
                })  # fmt: skip
            if self._client is None and loop.time() - failing_since_s > self._deadline_s:
                self._ended.set()
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    async def _publish(self, job: Job) -> None:
        held = job.slots.read(job.slot)
        is_there = held is not None and held.sequence == job.sequence
        if held is not None and is_there:
            async with self._storing:
                commit = await asyncio.to_thread(job.writer.commit, held, job.names)
            if job.slots is self._slots:
                self._published = max(self._published, job.sequence)
            self._tell_of(job, {"is": "committed", **asdict(commit)})
        with suppress(ValueError):  # a run that nobody wants any more was cleared meanwhile
            self._jobs.remove(job)
        if self._is_done() and is_there:
            remove_if_unlocked(job.slots)
        self._end_if_done()

    # -- journals ----------------------------------------------------------------------------------

    def _keep_soon(self) -> None:
        """Keep the journals when no checkpoint waits."""
        if self._writer is not None and self._journals:
            self._is_keeping = True
            self._num_keeps += 1
            self._wake.set()
        else:
            self._tell_kept()

    async def _keep_now(self) -> None:
        num_keeps = self._num_keeps
        if self._writer is not None:
            await self._keep_journals(self._writer.store)
        if num_keeps == self._num_keeps:  # else somebody has asked meanwhile, for what is there now
            self._is_keeping = False
            self._tell_kept()
            self._end_if_done()

    def _tell_kept(self) -> None:
        if self._awaits_keep:
            self._awaits_keep = False
            self._tell({"is": "kept"})

    async def _keep_journals(self, store: Store) -> None:
        """Bring the copies up to date; those that a store refuses wait for the next time."""
        for journal in list(self._journals):
            is_over = journal is not self._journals[-1]  # nobody writes there any more
            try:
                await asyncio.to_thread(journal.keep, store)
            except OSError:
                return
            if is_over and journal in self._journals:
                self._journals.remove(journal)
                journal.close()


def _cause(error: Exception, text: str) -> list[Any]:
    """Return what an OSError of the same kind is made of."""
    if isinstance(error, OSError) and error.errno and isinstance(error.filename, str | None):
        return [error.errno, error.strerror, error.filename]
    return [text]


def _as_recorded(store: Store, run: Run) -> Run | None:
    """Return our claim as it is recorded; None: somebody else's is, or none.

    A store that is away says so when it is back.

    A record that was removed by hand is written anew by the next claim, as other nodes look for it.
    """
    try:
        found = read_run(store)
    except OSError:
        return run
    if found is None or (found.generation, found.writer) != (run.generation, run.writer):
        return None
    # What it counts may not be written yet; whether it was preempted is written by the trainer.
    return replace(run, was_preempted=found.was_preempted)


def main(address: str, starter: int) -> NoReturn:
    """Serve at an abstract address; one that is taken has another persister, which is enough."""
    # Whoever ends a whole session or job means the trainers; this process ends when it is done.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{address}")
    except OSError as error:
        os._exit(error.errno != errno.EADDRINUSE)
    listener.listen()
    os.nice(_NICENESS)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    code = 0
    try:
        loop.run_until_complete(Persister(listener).run(starter))
    except Exception:  # noqa: BLE001 whoever has started it reads this
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # no thread that waits for a store may keep it


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
