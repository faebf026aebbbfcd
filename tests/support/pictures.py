"""Pictures for tests: valid ones in each format, and a server with scripted answers."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import PIL.Image

Answer = bytes | Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def picture(width: int = 4, height: int = 3, mode: str = "RGB") -> PIL.Image.Image:
    """Return a picture whose pixels all differ."""
    made = PIL.Image.new("RGB", (width, height))
    made.putdata([(i * 7 % 256, i * 13 % 256, i * 29 % 256) for i in range(width * height)])
    return made.convert(mode)


def encoded(made: PIL.Image.Image | None = None, format: str = "PNG", **options: Any) -> bytes:
    """Return a picture's file."""
    file = BytesIO()
    (made or picture()).save(file, format, **options)
    return file.getvalue()


def data_url(data: bytes | None = None, media_type: str = "image/png") -> str:
    """Return a `data:` URL of a picture's file."""
    return f"data:{media_type};base64,{text_of(data)}"


def text_of(data: bytes | None = None) -> str:
    """Return a file in base64."""
    return base64.b64encode(encoded() if data is None else data).decode()


def answer(body: bytes = b"", status: str = "200 OK", **headers: str | int) -> bytes:
    """Return an HTTP answer; `content_length` defaults to the body's length, and "" omits the header."""
    fields = {"content_length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value != ""]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


async def endless(head: bytes, writer: asyncio.StreamWriter) -> None:
    """Answer with a body that does not end."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
        await writer.drain()


@asynccontextmanager
async def web(
    answers: dict[str, Answer], tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Serve answers by path on a local port; yield the port and the heads of received requests."""
    heads: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            heads.append(head)
            found = answers[head.split(b" ")[1].decode()]
            if isinstance(found, bytes):
                writer.write(found)
                await writer.drain()
            else:
                await found(head, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        server.close()
