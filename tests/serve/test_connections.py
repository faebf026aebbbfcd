"""The additions of `Connection` to hypercorn's: turns, and an end whatever the reader does."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from typing import Any

import h11
import pytest

from tests.serve.conftest import ListeningAddress
from tests.support.serving import LOCAL, connect, serving
from tests.support.waiting import LONGEST_S, until
from tgi_asgi.serve import connections
from tgi_asgi.serve.connections import (
    MAX_AHEAD,
    Connection,
    ConnectionLimit,
    Requests,
    ResponseEnd,
    TurnLimiter,
)


async def test_connections_that_come_at_once_begin_a_few_a_turn_and_in_order() -> None:
    turn_limiter, passed = TurnLimiter(4), []

    async def begin(number: int) -> None:
        await turn_limiter.enter()
        passed.append(number)

    tasks = [asyncio.create_task(begin(number)) for number in range(30)]
    tasks[7].cancel()
    counts = []
    async with asyncio.timeout(LONGEST_S):
        while len(passed) < 29:
            before = len(passed)
            await asyncio.sleep(0)
            counts.append(len(passed) - before)
    assert max(counts) <= 4
    assert passed == [number for number in range(30) if number != 7]
    await turn_limiter.enter()  # no cancelled task is still queued before it


class _GivenUp:
    """A writer whose connection the kernel closed because the reader stalled."""

    transport = asyncio.Transport()

    def write_eof(self) -> None: ...

    def close(self) -> None: ...

    async def wait_closed(self) -> None:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


async def test_a_connection_that_the_kernel_gave_up_ends_without_a_traceback() -> None:
    unused: Any = None
    writer: Any = _GivenUp()
    loop = asyncio.get_running_loop()
    connection = Connection(
        ConnectionLimit(0), TurnLimiter(1), unused, loop, unused, unused, unused, unused, writer
    )
    await connection._close()


async def test_a_connection_whose_reader_stalls_does_not_wait_for_ever_to_be_closed(
    address: ListeningAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, give_up = asyncio.Event(), asyncio.Event()
    close = Connection._close

    async def closing(connection: Connection) -> None:
        await close(connection)
        closed.set()

    monkeypatch.setattr(connections, "CLOSE_S", 0.01)
    monkeypatch.setattr(Connection, "_close", closing)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = {"type": "http.response.body", "body": bytes(8 << 20), "more_body": True}
        sending = asyncio.create_task(send(body))
        await give_up.wait()
        sending.cancel()

    async with serving(app, "native", address.settings, send_buffer=8192) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url, address.tls, is_slow=True)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        give_up.set()
        await closed.wait()
        writer.transport.abort()


class _NeverClosed:
    """A writer whose client does not end TLS."""

    def __init__(self) -> None:
        self.transport = self
        self.is_aborted = asyncio.Event()
        self.abort = self.is_aborted.set

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...

    async def drain(self) -> None: ...


async def test_a_refused_connection_ends_whatever_the_client_does(monkeypatch: pytest.MonkeyPatch) -> None:
    unused: Any = None
    writer: Any = _NeverClosed()
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    connection = Connection(
        ConnectionLimit(0), TurnLimiter(1), unused, loop, unused, unused, unused, reader, writer
    )
    monkeypatch.setattr(connections, "_REFUSED_S", 0.01)
    await connection._refuse()
    async with asyncio.timeout(LONGEST_S):
        await writer.is_aborted.wait()


async def test_clients_of_a_unix_socket_have_no_address_and_so_no_limit() -> None:
    limit = ConnectionLimit(1)
    assert limit.enter("10.0.0.1")
    assert not limit.enter("10.0.0.1")
    assert limit.enter(None)
    assert limit.enter(None)
    with limit.handshake(None), limit.handshake(None) as time_s:
        assert time_s == connections.HANDSHAKE_S


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize(
    ("head_s", "keep_alive_s", "has_begun"), [(LONGEST_S, 0.05, False), (0.05, LONGEST_S, True)]
)
async def test_a_connection_without_a_request_is_kept_for_one_time_and_half_a_request_for_another(
    head_s: float, keep_alive_s: float, has_begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load balancers keep connections for minutes; a client that never ends its headers has less time."""
    settings = dataclasses.replace(LOCAL, keep_alive_timeout_s=keep_alive_s)
    async with serving(_answer, settings=settings) as url, asyncio.timeout(LONGEST_S / 2):
        reader, writer = await connect(url)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"ok")
        monkeypatch.setattr(connections, "HEAD_S", head_s)
        if has_begun:
            writer.write(b"GET / HTTP/1.1\r\n")
        assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_never_asks_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.05)
    async with serving(_answer) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize(
    ("headers", "rest"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"", b"\r\n\r"),
        (b"", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
        (b"", b"GET / HTTP/1.1\r\nx: " + bytes(MAX_AHEAD // 2)),
        (b"connection: upgrade\r\nupgrade: h2c\r\n", b""),
        (b"connection: close\r\n", b"\r\n"),
        (b"connection: close\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
    ],
    ids=["nothing", "a line", "half a line", "a request", "a long request", "h2c", "closing", "ignored"],
)
async def test_a_client_that_leaves_is_noticed_whatever_it_has_sent_after_its_request(
    headers: bytes, rest: bytes, address: ListeningAddress
) -> None:
    begun, noticed = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            if not message.get("more_body"):
                begun.set()
        noticed.set()

    async with serving(app, "native", address.settings) as url, asyncio.timeout(LONGEST_S):
        _, writer = await connect(url, address.tls)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n" + headers + b"\r\n{}" + rest)
        await begun.wait()
        assert not noticed.is_set()
        writer.close()
        await noticed.wait()


async def test_requests_that_do_not_wait_for_responses_are_answered_in_order(
    address: ListeningAddress,
) -> None:
    num_requests, body = 60, bytes(5000)
    assert num_requests * len(body) > 2 * MAX_AHEAD
    sent = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        size, message = 0, {"more_body": True}
        while message["more_body"]:
            message = await receive()
            size += len(message["body"])
        await sent.wait()  # all others come while the first is computed
        text = b"%s:%d;" % (scope["path"].encode(), size)
        headers = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    async with serving(app, "native", address.settings) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url, address.tls)
        for number in range(num_requests):
            head = b"POST /%d HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (number, len(body))
            writer.write(b"\r\n" + head + body)
        await writer.drain()
        sent.set()
        for number in range(num_requests):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readuntil(b";") == b"/%d:%d;" % (number, len(body))
        writer.close()


async def test_what_is_read_before_a_response_has_ended_is_bounded() -> None:
    reader, requests = asyncio.StreamReader(), Requests(h11.SERVER)
    requests.receive_data(b"GET")
    end = ResponseEnd(reader, requests)
    reader.feed_data(bytes(3 * MAX_AHEAD))
    for _ in range(3):  # short responses
        await end.clear()
        waiting = asyncio.create_task(end.wait())
        await until(lambda: len(requests.trailing_data[0]) >= MAX_AHEAD)
        await end.set()
        await waiting
        assert len(requests.trailing_data[0]) == MAX_AHEAD
    requests.receive_data(b"nothing has closed the connection")
    assert len(await reader.readexactly(2 * MAX_AHEAD + 3)) == 2 * MAX_AHEAD + 3


async def test_what_comes_as_a_response_ends_stays_with_the_reader() -> None:
    reader, requests = asyncio.StreamReader(), Requests(h11.SERVER)
    end = ResponseEnd(reader, requests)
    waiting = asyncio.create_task(end.wait())
    reader.feed_data(b"GET")
    await asyncio.sleep(0)
    reader.feed_data(b" /")
    await end.set()
    await waiting
    assert requests.trailing_data[0] == b""
    assert await reader.read(9) == b"GET /"


@pytest.mark.parametrize(
    "rest", [b"\r\n", b"GET /next HTTP/1.1\r\nhost: x\r\n\r\n"], ids=["a line", "a request"]
)
async def test_the_last_request_of_a_connection_is_answered_whatever_follows_it(rest: bytes) -> None:
    async with serving(_answer) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        writer.write(b"POST / HTTP/1.0\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}" + rest)
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1
