"""An HTTP proxy that disturbs chosen requests, on loopback."""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

BLOCK = 1 << 18

RESET = "reset"  # before anything is answered
RESET_BEFORE_BODY = "the server gets the request's head, its body never comes"
RESET_MID_BODY = "the server gets the request's head and half its body"
LOST_ANSWER = "the server does it, its answer is lost"
TRUNCATED = "the answer's body ends too early"
STALL = "the answer does not end and the connection stays"

CUT_REQUESTS = [RESET_BEFORE_BODY, RESET_MID_BODY]
CONNECTION_FAULTS = [RESET, *CUT_REQUESTS, LOST_ANSWER, TRUNCATED]


@dataclass(frozen=True)
class Reply:
    """An answer that the server never gave."""

    status: int
    code: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.code}".strip()

    def body(self) -> bytes:
        if not self.code:
            return b"<html><body>Something between you and the server</body></html>"
        return f"<?xml version='1.0'?><Error><Code>{self.code}</Code></Error>".encode()


PASSING_REPLIES = [
    Reply(500, "InternalError"),
    Reply(503, "SlowDown"),
    Reply(503),
    Reply(429, "TooManyRequests"),
    Reply(400, "RequestTimeout"),
]


@dataclass
class Head:
    """The first line and the headers of a message."""

    raw: bytes
    first_line: str = field(init=False)
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        first, *rest = self.raw.decode("latin-1").split("\r\n")
        self.first_line = first
        pairs = [line.partition(":") for line in rest if line]
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", "0"))

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "")

    @property
    def has_no_body(self) -> bool:
        return self.first_line.split()[1] in {"204", "304"}


class Proxy:
    """Hands everything on, but for the requests it is told to disturb."""

    def __init__(self, upstream_port: int) -> None:
        self.seen: list[str] = []
        """Such as "PUT /bucket/key?partNumber=1" and "GET /bucket/key bytes=0-99"."""
        self.num_disturbed = 0
        self._upstream_port = upstream_port
        self.calm()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{port}"

    def disturb(self, fault: str | Reply, pattern: str, times: int = 1) -> None:
        """Disturb the next requests that match."""
        self._fault, self._pattern, self._left = fault, re.compile(pattern), times

    def meanwhile(self, pattern: str, action: Callable[[], object]) -> None:
        """Do something else before the next matching request is handed on."""
        self._action = (re.compile(pattern), action)

    def hide(self, key: str) -> None:
        """Leave a key out of every listing from now on."""
        self._hidden = key

    def slow_down(self, bytes_per_s: float) -> None:
        """Hand bodies of answers on at this speed."""
        self._pause_s = BLOCK / bytes_per_s

    def calm(self) -> None:
        """Disturb nothing any longer."""
        self._fault: str | Reply = ""
        self._pattern, self._left = re.compile(""), 0
        self._action: tuple[re.Pattern[str], Callable[[], object]] | None = None
        self._hidden, self._pause_s = "", 0.0
        self.seen.clear()
        self.num_disturbed = 0

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # -- one connection ----------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        endings = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        server_writer = None
        with contextlib.suppress(*endings):
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self._upstream_port, limit=1 << 20
            )
            while True:
                head = Head(await reader.readuntil(b"\r\n\r\n"))
                await self._handle(head, (reader, writer), (server_reader, server_writer))
        for each in (writer, server_writer):
            if each:
                each.close()

    async def _handle(self, head: Head, client: tuple, server: tuple) -> None:
        asked = head.first_line.rpartition(" ")[0], head.headers.get("range", "")
        request = " ".join(asked).strip()
        fault = self._take_fault(request)
        await self._act(request)
        if fault == RESET:
            _reset(client[1])
        if isinstance(fault, Reply):
            await _copy_body(head, client[0], None)
            await _answer(fault, request, client[1])
            return
        if fault in CUT_REQUESTS and not head.length:
            _reset(client[1])
        server[1].write(head.raw)
        if fault in CUT_REQUESTS:
            most = 0 if fault == RESET_BEFORE_BODY else head.length // 2
            await _copy_body(head, client[0], server[1], most=most)
            _reset(client[1])
        await _copy_body(head, client[0], server[1])
        await self._return(request, fault, client[1], server[0])

    async def _return(
        self,
        request: str,
        fault: str | Reply | None,
        writer: asyncio.StreamWriter,
        reader: asyncio.StreamReader,
    ) -> None:
        head = Head(await reader.readuntil(b"\r\n\r\n"))
        if fault == LOST_ANSWER:
            _reset(writer)
        if fault == STALL and not head.length:
            await asyncio.sleep(3600)
        if self._hidden and "list-type=2" in request:
            await _lie(head, reader, writer, self._hidden)
            return
        writer.write(head.raw)
        if request.startswith("HEAD ") or head.has_no_body:
            await writer.drain()
            return
        if fault in {TRUNCATED, STALL}:
            await _copy_body(head, reader, writer, most=head.length // 2)
            await asyncio.sleep(0.05 if fault == TRUNCATED else 3600)
            _reset(writer)
        await _copy_body(head, reader, writer, pause_s=self._pause_s)

    def _take_fault(self, request: str) -> str | Reply | None:
        self.seen.append(request)
        if self._left == 0 or not self._pattern.search(request):
            return None
        self._left -= 1
        self.num_disturbed += 1
        return self._fault

    async def _act(self, request: str) -> None:
        if self._action and self._action[0].search(request):
            action, self._action = self._action[1], None
            await asyncio.get_running_loop().run_in_executor(None, action)


def _reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    raise ConnectionResetError


async def _answer(reply: Reply, request: str, writer: asyncio.StreamWriter) -> None:
    body = b"" if request.startswith("HEAD ") else reply.body()
    head = f"HTTP/1.1 {reply.status} Disturbed\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def _lie(
    head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hidden: str
) -> None:
    body = await reader.readexactly(head.length)
    entry = rf"<Contents>(?:(?!</Contents>).)*?<Key>{re.escape(hidden)}</Key>.*?</Contents>"
    body = re.sub(entry.encode(), b"", body, flags=re.DOTALL)
    raw = re.sub(rb"(?i)content-length: *\d+", b"Content-Length: %d" % len(body), head.raw)
    writer.write(raw + body)
    await writer.drain()


async def _copy_body(
    head: Head,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter | None,
    *,
    most: int | None = None,
    pause_s: float = 0.0,
) -> None:
    if head.is_chunked:
        await _copy_chunks(reader, writer)
        return
    left = head.length if most is None else most
    while left:
        block = await reader.read(min(left, BLOCK))
        if not block:
            raise ConnectionResetError
        left -= len(block)
        await _write(writer, block)
        await asyncio.sleep(pause_s)


async def _copy_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None) -> None:
    size = 1
    while size:
        line = await reader.readline()
        size = int(line.partition(b";")[0], 16)
        await _write(writer, line + await reader.readexactly(size + 2))


async def _write(writer: asyncio.StreamWriter | None, data: bytes) -> None:
    if writer:
        writer.write(data)
        await writer.drain()
