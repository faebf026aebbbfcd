"""The app over real sockets, on each server: framing, disconnects, readers that stall."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.asgi import events_of
from tests.support.scripted_engine import ScriptedChannel, ScriptedEngine, say, scripted_app
from tests.support.serving import serving
from tests.support.waiting import LONGEST_S
from tgi_asgi.api import sse
from tgi_asgi.errors import TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.types import TokenEvent

pytestmark = pytest.mark.parametrize("server", ["native", "hypercorn", "uvicorn"])

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


class Connection:
    """A client that a test controls exactly."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, url: str, *, receive_buffer: int | None = None) -> Connection:
        raw = socket.socket()
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.setblocking(False)
        parts = urlsplit(url)
        await asyncio.get_running_loop().sock_connect(raw, (parts.hostname, parts.port))
        return cls(*await asyncio.open_connection(sock=raw, limit=8192))

    async def post(self, path: str, body: Any) -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self.writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(LONGEST_S):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value for name, value in headers.items()}

    async def chunk(self) -> bytes:
        """Return one chunk of a chunked body, or b"" at its end."""
        async with asyncio.timeout(LONGEST_S):
            size = int(await self.reader.readline(), 16)
            data = await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        return data

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def endless(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
    """Deliver a token of a kilobyte every half millisecond."""
    while True:
        await asyncio.sleep(0.0005)
        yield [TokenEvent(0, 97, b"a" * 1000, "a" * 1000)]


async def silent(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
    """Never deliver anything."""
    await asyncio.Event().wait()
    yield []


async def cancelled(engine: ScriptedEngine) -> None:
    """Wait until the first request is cancelled."""
    async with asyncio.timeout(LONGEST_S):
        while not engine.channels or not engine.channels[0].is_cancelled:
            await asyncio.sleep(0.002)
    assert engine.num_permits == 128


async def test_every_chunk_holds_whole_events_and_the_connection_lives_on(server: str) -> None:
    engine = ScriptedEngine(say("a", "b", "c"))
    async with serving(scripted_app(engine), server) as url:
        connection = await Connection.to(url)
        for _ in range(2):
            await connection.post(CHAT, {"messages": HI, "stream": True, "n": 2})
            status, headers = await connection.head()
            assert (status, headers["transfer-encoding"]) == (200, "chunked")
            assert headers["content-type"] == "text/event-stream; charset=utf-8"
            body = b""
            while data := await connection.chunk():
                events_of(data)
                body += data
            assert events_of(body)[-1] == "[DONE]"
            await connection.post(CHAT, {"messages": []})
            status, headers = await connection.head()
            assert status == 400
            await connection.reader.readexactly(int(headers["content-length"]))
        await connection.close()


async def test_a_client_that_leaves_a_stream_is_noticed(server: str) -> None:
    engine = ScriptedEngine(endless)
    async with serving(scripted_app(engine), server) as url:
        connection = await Connection.to(url)
        await connection.post(CHAT, {"messages": HI, "stream": True})
        await connection.head()
        await connection.chunk()
        await connection.close()
        await cancelled(engine)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_leaves_before_the_first_token_is_noticed(server: str, is_stream: bool) -> None:
    engine = ScriptedEngine(silent)
    async with serving(scripted_app(engine), server) as url:
        connection = await Connection.to(url)
        await connection.post(CHAT, {"messages": HI, "stream": is_stream})
        async with asyncio.timeout(LONGEST_S):
            while not engine.channels:
                await asyncio.sleep(0.002)
        await connection.close()
        await cancelled(engine)


async def test_a_reader_that_never_reads_is_cut_off_and_disturbs_nobody(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "MAX_WAITING_EVENTS", 200)
    engine = ScriptedEngine(endless)
    async with serving(scripted_app(engine), server, send_buffer=8192) as url:
        stalled = await Connection.to(url, receive_buffer=4096)
        with caplog.at_level(logging.WARNING):
            await stalled.post(CHAT, {"messages": HI, "stream": True})
            async with asyncio.timeout(LONGEST_S):
                while not engine.channels:
                    await asyncio.sleep(0.002)
            engine.script = say("a", "b")
            other = await Connection.to(url)
            await other.post(CHAT, {"messages": HI, "stream": True})
            await other.head()
            while await other.chunk():
                pass
            await cancelled(engine)
        assert "tokens behind" in caplog.text
        stalled.writer.transport.abort()
        await other.close()


async def test_a_reader_that_pauses_loses_nothing(server: str) -> None:
    async def many(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        for i in range(600):
            await asyncio.sleep(0)
            text = f"{i:>1000}"
            yield [TokenEvent(0, 97, text.encode(), text)]
        async for batch in say("end")(channel):
            yield batch

    engine = ScriptedEngine(many)
    async with serving(scripted_app(engine), server, send_buffer=8192) as url:
        connection = await Connection.to(url, receive_buffer=4096)
        await connection.post(CHAT, {"messages": HI, "stream": True})
        async with asyncio.timeout(LONGEST_S):
            while not engine.channels or not engine.channels[0].ended.is_set():
                await asyncio.sleep(0.002)
        await connection.head()
        body = b""
        num_chunks = 0
        while data := await connection.chunk():
            body += data
            num_chunks += 1
        events = events_of(body)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
        assert text == "".join(f"{i:>1000}" for i in range(600)) + "end"
        assert num_chunks < 500  # waiting tokens were sent together
        await connection.close()


async def test_a_body_over_the_limit_is_answered_before_the_connection_closes(server: str) -> None:
    app = scripted_app(ScriptedEngine(), Settings(payload_limit=1000))
    async with serving(app, server) as url, httpx.AsyncClient() as client:
        response = await client.post(url + CHAT, content=b"x" * 1_000_000)
        assert response.status_code == 413

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"x" * 1000

        response = await client.post(url + CHAT, content=pieces())
        assert response.status_code == 413


async def test_errors_without_a_body_read_leave_a_clean_connection(server: str) -> None:
    app = scripted_app(ScriptedEngine(), Settings(api_key=("k",)))
    async with serving(app, server) as url, httpx.AsyncClient() as client:
        for _ in range(3):
            response = await client.post(url + CHAT, json={"messages": HI, "x": "y" * 200_000})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"


async def test_slashes_in_model_names_raw_and_escaped(server: str) -> None:
    async with serving(scripted_app(ScriptedEngine()), server) as url, httpx.AsyncClient() as client:
        for path in ("toy/model", "toy%2Fmodel"):
            response = await client.get(f"{url}/v1/models/{path}")
            assert response.json()["id"] == "toy/model"
        response = await client.get(f"{url}/v1/models/org%2Fother")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        response = await client.head(f"{url}/health")
        assert response.status_code == 200
