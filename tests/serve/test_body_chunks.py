"""Direct writes of body chunks: the bytes on the wire equal hypercorn's, whatever the client does."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from tests.serve.conftest import ListeningAddress
from tests.support.serving import LOCAL, App, connect, serving
from tests.support.waiting import LONGEST_S
from tgi_asgi.api.sse import DIRECT_WRITE
from tgi_asgi.serve import body_chunks
from tgi_asgi.serve.body_chunks import Stream

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
LAST_REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
BODIES = [b"data: a\n\n", b"", b"x" * 17, b"y" * 200_000, bytes(range(256)), b"data: [DONE]\n\n"]


@pytest.fixture
def num_written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that counts the chunks written directly."""
    results: list[bool] = []
    write_now = Stream.write_now

    def counted(stream: Stream, body: bytes) -> bool:
        results.append(write_now(stream, body))
        return results[-1]

    monkeypatch.setattr(Stream, "write_now", counted)
    return lambda: sum(results)


async def send_chunk(scope: Any, send: Any, body: bytes) -> None:
    """Write directly if the server offers that and the connection is writable; otherwise use `send`."""
    write_now = (scope.get("extensions") or {}).get(DIRECT_WRITE)
    if write_now is None or not write_now(body):
        await send({"type": "http.response.body", "body": body, "more_body": True})


def stream(bodies: Sequence[bytes], *, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> App:
    """Return an app that answers every request with these chunks; the last one ends the body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body", False):
            pass
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        for body in bodies[:-1]:
            await send_chunk(scope, send, body)
        await send({"type": "http.response.body", "body": bodies[-1], "more_body": False})

    return app


async def exchanged(app: App, server: str, address: ListeningAddress, *requests: bytes) -> bytes:
    """Send the requests on one connection; return the whole answer without its date."""
    async with serving(app, server, address.settings) as url:
        reader, writer = await connect(url, address.tls)
        for request in requests:
            writer.write(request)
        async with asyncio.timeout(LONGEST_S):
            answer = await reader.read(-1)
        writer.close()
    return re.sub(rb"date: [^\r]*\r\n", b"", answer)


@pytest.mark.parametrize(
    ("requests", "status", "headers", "is_short"),
    [
        pytest.param([LAST_REQUEST], 200, [], True, id="chunked"),
        pytest.param([REQUEST, REQUEST, LAST_REQUEST], 200, [], True, id="pipelined"),
        pytest.param(
            [b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc"],
            200,
            [(b"Transfer-Encoding", b"chunked")],
            True,
            id="said to be chunked",
        ),
        pytest.param(
            [LAST_REQUEST],
            200,
            [(b"Content-Length", b"%d" % sum(map(len, BODIES)))],
            False,
            id="with a length",
        ),
        pytest.param([LAST_REQUEST.replace(b"GET", b"HEAD")], 200, [], False, id="HEAD"),
        pytest.param([b"GET / HTTP/1.0\r\nhost: x\r\n\r\n"], 200, [], False, id="HTTP/1.0"),
        pytest.param([LAST_REQUEST], 204, [], False, id="no content"),
        pytest.param([LAST_REQUEST], 404, [], False, id="an error"),
    ],
)
async def test_the_bytes_are_those_of_hypercorn(
    requests: list[bytes],
    status: int,
    headers: list[tuple[bytes, bytes]],
    is_short: bool,
    num_written: Callable[[], int],
    address: ListeningAddress,
) -> None:
    app = stream(BODIES, status=status, headers=headers)
    expected = await exchanged(app, "hypercorn", address, *requests)
    assert num_written() == 0
    assert expected.startswith(b"HTTP/1.1 %d " % status)
    assert await exchanged(app, "native", address, *requests) == expected
    assert (num_written() > 0) == is_short


async def test_what_an_app_sends_after_the_end_does_not_reach_the_next_response(
    address: ListeningAddress,
) -> None:
    """As under hypercorn, it is an error; the next response on the connection has begun by then."""
    errors: list[str] = []
    second_began = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/second":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send_chunk(scope, send, b"second")
            second_began.set()
            await asyncio.sleep(0.01)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await stream([b"first", b"end"])(scope, receive, send)
        await second_began.wait()
        try:
            await send_chunk(scope, send, b"late")
        except Exception as error:
            errors.append(type(error).__name__)

    requests = [REQUEST, LAST_REQUEST.replace(b"GET / ", b"GET /second ")]
    expected = await exchanged(app, "hypercorn", address, *requests)
    assert expected.endswith(b"6\r\nsecond\r\n0\r\n\r\n")
    second_began.clear()
    assert await exchanged(app, "native", address, *requests) == expected
    assert errors == ["UnexpectedMessageError"] * 2


def endless(ended: asyncio.Event, sent: list[int], wait: Callable[[], Awaitable[None]]) -> App:
    """Return an app that sends numbered chunks of a kilobyte until the client has gone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send_chunk(scope, send, b"%1000d" % len(sent))
            sent.append(len(sent))
            await wait()
        assert (await gone)["type"] == "http.disconnect"
        ended.set()

    return app


async def test_a_client_that_leaves_is_noticed_and_nothing_more_is_written(
    num_written: Callable[[], int], address: ListeningAddress
) -> None:
    ended = asyncio.Event()
    late: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await endless(ended, [], lambda: asyncio.sleep(0.001))(scope, receive, send)
        before = num_written()
        for _ in range(3):
            await send_chunk(scope, send, b"late")
        late.append(num_written() - before)

    async with serving(app, "native", address.settings) as url:
        reader, writer = await connect(url, address.tls)
        writer.write(REQUEST)
        async with asyncio.timeout(LONGEST_S):
            assert (await reader.read(1 << 16)).startswith(b"HTTP/1.1 200")
            connection = writer.get_extra_info("socket")  # to send a reset rather than an end of stream
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            await ended.wait()
    assert num_written() > 0
    assert late == [0]


async def test_a_client_that_sends_no_more_has_left(address: ListeningAddress) -> None:
    """The client may still read, but a closed connection looks the same."""
    ended = asyncio.Event()
    async with serving(endless(ended, [], lambda: asyncio.sleep(0.001)), "native", address.settings) as url:
        reader, writer = await connect(url, address.tls)
        writer.write(REQUEST)
        async with asyncio.timeout(LONGEST_S):
            assert (await reader.read(1 << 16)).startswith(b"HTTP/1.1 200")
            with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as half:
                half.shutdown(socket.SHUT_WR)
            await ended.wait()
            while await reader.read(1 << 16):
                pass  # read until the server closes the connection
        writer.close()


async def test_a_reader_that_stalls_stops_the_app_and_loses_nothing(
    num_written: Callable[[], int], address: ListeningAddress
) -> None:
    """Buffered data stays below the high water mark; then everything arrives, in order."""
    ended = asyncio.Event()
    sent: list[int] = []
    app = endless(ended, sent, lambda: asyncio.sleep(0))
    async with serving(app, "native", address.settings, send_buffer=8192) as url:
        reader, writer = await connect(url, address.tls, is_slow=True)
        writer.write(REQUEST)
        async with asyncio.timeout(LONGEST_S):
            seen = -1
            while seen != len(sent) or not sent:  # until nothing more is sent for a tenth of a second
                seen = len(sent)
                await asyncio.sleep(0.1)
        assert len(sent) < 1500
        await reader.readuntil(b"\r\n\r\n")
        for i in range(3 * len(sent)):
            async with asyncio.timeout(LONGEST_S):
                assert await reader.readexactly(1007) == b"3e8\r\n%1000d\r\n" % i
        assert num_written() > 0
        writer.transport.abort()
        async with asyncio.timeout(LONGEST_S):
            await ended.wait()


async def test_a_connection_of_another_kind_keeps_its_own_way(
    num_written: Callable[[], int], monkeypatch: pytest.MonkeyPatch, address: ListeningAddress
) -> None:
    monkeypatch.setattr(body_chunks, "TCPServer", type("Other", (), {}))
    expected = await exchanged(stream(BODIES), "hypercorn", address, LAST_REQUEST)
    assert await exchanged(stream(BODIES), "native", address, LAST_REQUEST) == expected
    assert num_written() == 0


@pytest.mark.parametrize(
    ("server", "request_line", "is_there"),
    [
        ("native", b"GET / HTTP/1.1", True),
        ("native", b"HEAD / HTTP/1.1", False),
        ("native", b"GET / HTTP/1.0", False),
        ("hypercorn", b"GET / HTTP/1.1", False),
        ("uvicorn", b"GET / HTTP/1.1", False),
    ],
)
async def test_the_app_is_told_where_there_is_a_short_way(
    server: str, request_line: bytes, is_there: bool
) -> None:
    offered: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        offered.append(DIRECT_WRITE in (scope.get("extensions") or {}))
        await stream([b"end"])(scope, receive, send)

    request = request_line + b"\r\nhost: x\r\nconnection: close\r\n\r\n"
    await exchanged(app, server, ListeningAddress(LOCAL), request)
    assert offered == [is_there]


async def test_the_short_way_is_shut_before_a_response_begins_and_after_its_end() -> None:
    written: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        write_now = scope["extensions"][DIRECT_WRITE]
        written.append(write_now(b"early"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        written.append(write_now(b"chunk"))
        await send({"type": "http.response.body", "body": b"end", "more_body": False})
        written.append(write_now(b"late"))

    answer = await exchanged(app, "native", ListeningAddress(LOCAL), LAST_REQUEST)
    assert written == [False, True, False]
    assert answer.endswith(b"\r\n\r\n5\r\nchunk\r\n3\r\nend\r\n0\r\n\r\n")
