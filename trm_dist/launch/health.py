"""/healthz: whether this node gets on, for a probe that would replace it if it did not."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

Health = Callable[[], tuple[bool, dict[str, Any]]]
"""Returns whether all is well, and what there is to say."""

_READ_S = 5.0


async def serve_health(port: int, health: Health) -> asyncio.Server:
    """Answer GET /healthz on all addresses: 200 when all is well, else 503."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = (await asyncio.wait_for(reader.readline(), _READ_S)).decode("latin-1")
            writer.write(_response(line, health))
            await writer.drain()
        except (OSError, TimeoutError, ValueError):
            pass
        finally:
            writer.close()

    return await asyncio.start_server(answer, port=port)


def _response(request: str, health: Health) -> bytes:
    method, path, *_ = [*request.split(), "", ""]
    if path != "/healthz":
        status, body = "404 Not Found", "only /healthz is here\n"
    elif method not in {"GET", "HEAD"}:
        status, body = "405 Method Not Allowed", "GET it\n"
    else:
        is_well, content = health()
        status = "200 OK" if is_well else "503 Service Unavailable"
        body = json.dumps(content) + "\n"
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return (head + ("" if method == "HEAD" else body)).encode()
