"""`Expect: 100-continue`: a request that its headers forbid gets the refusal, any other the 100 first."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tests.support.serving import Streams, connect, serving
from tests.support.waiting import LONGEST_S
from tgi_asgi.settings import Settings

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()


def head(path: str = CHAT, *, size: int = len(BODY), more: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {size}\r\n{more}"
    return f"{lines}authorization: Bearer secret\r\n\r\n".encode()


async def answer(streams: Streams) -> tuple[int, dict[str, str]]:
    """Return the status and headers that come next, without the body that follows them."""
    async with asyncio.timeout(LONGEST_S):
        lines = (await streams[0].readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        await streams[0].readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        pytest.param(head(size=1001), 413, id="too large"),
        pytest.param(head("/generate", size=1001), 415, id="native"),
        pytest.param(head("/v1/nope"), 404, id="no route"),
        pytest.param(head().replace(b"secret", b"wrong"), 401, id="wrong key"),
        pytest.param(head(more="content-encoding: gzip\r\n"), 415, id="compressed"),
    ],
)
async def test_a_request_refused_by_its_headers_is_not_told_to_go_on(
    request_head: bytes, status: int
) -> None:
    app = scripted_app(ScriptedEngine(), Settings(payload_limit=1000, api_key=("secret",)))
    async with serving(app) as url:
        streams = await connect(url)
        streams[1].write(request_head)
        found, headers = await answer(streams)
        assert (found, headers["connection"]) == (status, "close")
        async with asyncio.timeout(LONGEST_S):
            assert await streams[0].read() == b""
        streams[1].close()


async def test_a_body_that_is_read_is_asked_for_and_the_connection_lives_on() -> None:
    async with serving(scripted_app(ScriptedEngine())) as url:
        streams = await connect(url)
        for _ in range(2):
            streams[1].write(head())
            assert (await answer(streams))[0] == 100
            streams[1].write(BODY)
            assert (await answer(streams))[0] == 200
        streams[1].close()


async def test_a_body_that_comes_at_once_is_not_asked_for() -> None:
    async with serving(scripted_app(ScriptedEngine(), Settings(payload_limit=1000))) as url:
        streams = await connect(url)
        streams[1].write(head() + BODY)
        assert (await answer(streams))[0] == 200
        streams[1].write(head(size=1001) + b" " * 1001)
        assert (await answer(streams))[0] == 413
        streams[1].close()
