"""Additions to hypercorn's connections: closing with the client, fair turns, a per-client limit.

Used only by `hypercorn.py`, which installs these classes instead of hypercorn's, because it has no hooks for
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import h11
from hypercorn.asyncio.tcp_server import MAX_RECV, TCPServer
from hypercorn.asyncio.worker_context import EventWrapper
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol

# No route is known yet, so neither is the API's wire format.
_BODY = b'{"error":"Too many connections from this address","error_type":"overloaded"}'
_REFUSAL = (
    b"HTTP/1.1 429 \r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)

_REFUSALS = {
    426: "This server has no WebSockets; send the request by HTTP",
    431: "The request line and headers are too large",
    501: "This transfer encoding is not supported; send chunked or a content-length",
    505: "This server speaks HTTP/1.0 and HTTP/1.1",
}

_EMPTY_LINES = re.compile(rb"(\r?\n)+")

# Time a connection's last bytes may wait for a stalled reader; over TCP the kernel then gives up the
# connection.
CLOSE_S = 120.0
# Time for a connection's first request, and for the rest of any request's head.
HEAD_S = 75.0
# Time for a TLS handshake, and for that of a connection that will be refused, so that it can be told why.
HANDSHAKE_S = 30.0
REFUSED_HANDSHAKE_S = 2.0
# Time for a refused connection's request, and then for its end.
_REFUSED_S = 1.0
# Bytes after a request that may wait for its response's end. If a client sends more, its leaving is noticed
# only then.
MAX_AHEAD = 2 * MAX_RECV


class TurnLimiter:
    """Lets a few callers through in each turn of the event loop, in order.

    Otherwise a thousand simultaneous requests, on new or existing connections, would be parsed and started in
    a few turns of half a second each, and every stream would stall meanwhile.
    """

    def __init__(self, max_per_turn: int) -> None:
        self._max_per_turn = max_per_turn
        self._num_passed = 0  # in the current turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait for this caller's turn."""
        loop = asyncio.get_running_loop()
        if self._num_passed < self._max_per_turn and not self._waiting:
            self._num_passed += 1
            if self._num_passed == 1:
                loop.call_soon(self._turn, loop)
            return
        future = loop.create_future()
        self._waiting.append(future)
        await future

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_passed = 0
        while self._waiting and self._num_passed < self._max_per_turn:
            future = self._waiting.popleft()
            if not future.done():  # otherwise its connection was dropped
                future.set_result(None)
                self._num_passed += 1
        if self._num_passed or self._waiting:
            loop.call_soon(self._turn, loop)


class ConnectionLimit:
    """Counts the connections of each address, open or in a TLS handshake; 0 means no limit."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._open: Counter[str | None] = Counter()
        self._beginning: Counter[str | None] = Counter()

    @contextlib.contextmanager
    def handshake(self, address: str | None) -> Iterator[float]:
        """Count a handshake; yield the time that it has, which is short if its address is at the limit.

        A client with as many connections as it may have thus gets a refusal that it can read, and one that
        is silent does not hold more connections than those.
        """
        is_refused = self._is_reached(address, self._open[address] + self._beginning[address])
        self._beginning[address] += 1
        try:
            yield REFUSED_HANDSHAKE_S if is_refused else HANDSHAKE_S
        finally:
            _decrement(self._beginning, address)

    def enter(self, address: str | None) -> bool:
        """Count a connection; return False instead if its address is at the limit. No address: no limit."""
        if self._is_reached(address, self._open[address]):
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str | None) -> None:
        """Stop counting a connection of this address."""
        _decrement(self._open, address)

    def _is_reached(self, address: str | None, num_connections: int) -> bool:
        return 0 < self._max_connections <= num_connections and address is not None


def _decrement(counter: Counter[str | None], address: str | None) -> None:
    counter[address] -= 1
    if not counter[address]:
        del counter[address]


def address_of(peer: object) -> str | None:
    """Return the address of a peer's name; clients on a Unix socket have none."""
    return peer[0] if isinstance(peer, tuple) else None


class Connection(TCPServer):
    """One connection.

    hypercorn keeps the socket and three tasks of a connection that the client has closed until its keep-alive
    time is over, and grants that time to half a request, too. The time has to be long, because load balancers
    keep connections for minutes (Google's for ten) and would send a request on one that is just being closed.
    """

    def __init__(self, limit: ConnectionLimit, turn_limiter: TurnLimiter, *args: Any) -> None:
        super().__init__(*args)
        self._limit = limit
        self._turn_limiter = turn_limiter
        self._has_gone = False
        self._is_idle = True  # waits for a request, or for the rest of its head
        self._has_begun = True  # part of a head may have come; the first request has no more time than that
        self._idle_s = HEAD_S

    async def run(self) -> None:
        address = address_of(self.writer.get_extra_info("peername"))
        if not self._limit.enter(address):
            await self._refuse()
            return
        try:
            await super().run()
        except asyncio.CancelledError:
            # The server is ending. On Python 3.11, asyncio's callback logs a cancelled connection as an
            # error.
            self.writer.transport.abort()
        finally:
            self._limit.leave(address)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._is_idle, self._has_begun = event.idle, False
            self._idle_s = self.config.keep_alive_timeout
            if self._has_gone:
                return  # it would restart the keep-alive time
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        """Read as hypercorn does, but parse in turn and close at once when the client has closed."""
        if isinstance(self.protocol.protocol, Http1):
            self.protocol.protocol.watch(self.reader)
        with contextlib.suppress(OSError):
            while data := await self.reader.read(MAX_RECV):
                await self._turn_limiter.enter()
                await self.protocol.handle(RawData(data))
                if self._is_idle and not self._has_begun:
                    self._has_begun, self._idle_s = True, HEAD_S
                    await self.idle_task.restart(self._task_group, self._idle_timeout)
        await self.protocol.handle(Closed())
        self._has_gone = True
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        """Close the connection if nothing happens in time, or the server ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.context.terminated.wait(), self._idle_s)
        await asyncio.shield(self._initiate_server_close())

    async def _close(self) -> None:
        abort = self.loop.call_later(CLOSE_S, self.writer.transport.abort)
        # hypercorn would turn the kernel's timeout of a stalled reader (ETIMEDOUT) into a traceback.
        with contextlib.suppress(OSError):
            await super()._close()
        abort.cancel()

    async def _refuse(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_REFUSED_S):
                await self.reader.read(1 << 16)  # if bytes stay unread, the client sees a reset
                self.writer.write(_REFUSAL)
                await self.writer.drain()
        self.writer.close()
        # uvloop would wait 30 s for the client to end TLS, too.
        self.loop.call_later(_REFUSED_S, self.writer.transport.abort)


class ResponseEnd(EventWrapper):
    """The end of a response, for which hypercorn waits before it parses what follows the request.

    hypercorn reads nothing meanwhile, and would not notice that the client leaves: an answer for nobody would
    be computed to its end. It waits so if the next request has come (pipelining), or if this one asks for
    another protocol, as those of Java's client do.
    """

    def __init__(self, reader: asyncio.StreamReader, requests: Requests) -> None:
        super().__init__()
        self._reader = reader
        self._requests = requests

    async def wait(self) -> None:
        """Wait until the response has ended.

        Raises:
            ConnectionError: if the client closes first.
        """
        waiting = {asyncio.create_task(super().wait()), asyncio.create_task(self._watch())}
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for task in done:
            task.result()

    async def _watch(self) -> None:
        """Read ahead as far as allowed; raise a ConnectionError if the client closes before that."""
        num_free = MAX_AHEAD - len(self._requests.trailing_data[0])
        if num_free > 0:
            try:
                self._requests.receive_data(await self._reader.readexactly(num_free))
            except asyncio.IncompleteReadError:
                raise ConnectionResetError from None
        await super().wait()


class Requests(h11.Connection):
    """A client's requests; empty lines before one are ignored, as RFC 9112, section 2.2, asks.

    Old clients send one after a body. h11 takes it for a request without a line.
    """

    @property
    def they_are_waiting_for_100_continue(self) -> bool:
        """False, so that hypercorn does not send `100 Continue` at once: `continues.py` does it later."""
        return False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Parse the next event out of the received bytes, as h11 does."""
        buffer = self._receive_buffer
        if self.their_state is h11.MUST_CLOSE:  # nothing counts after its last request (section 9.6)
            buffer.maybe_extract_at_most(len(buffer))
        elif self.their_state in (h11.IDLE, h11.DONE):
            if (found := _EMPTY_LINES.match(buffer._data)) is not None:  # h11 has no other way to look
                buffer.maybe_extract_at_most(found.end())
            if buffer._data == b"\r":  # the other half of an empty line is to come
                return h11.NEED_DATA
        return super().next_event()


class Http1(H11Protocol):
    """HTTP/1 only on one connection: hypercorn's HTTP/2 kills connections that are answered early."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        size = self.config.h11_max_incomplete_size
        self.connection = self._requests = Requests(h11.SERVER, max_incomplete_event_size=size)

    def watch(self, reader: asyncio.StreamReader) -> None:
        """Notice, from now on, if the client closes while what follows its request has to wait."""
        self.can_read = ResponseEnd(reader, self._requests)

    async def _check_protocol(self, event: h11.Request) -> None:
        """Do not switch protocols; a server may ignore an upgrade request."""

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.http_version.startswith(b"1."):  # looks like an HTTP/2 preface with prior knowledge
            await self._refuse(505, request)
        elif _size_of(request) > self.config.h11_max_incomplete_size:
            # h11 counts only the bytes of a head that is not complete yet, so one that arrives with the last
            # of them may have twice as many.
            await self._refuse(431, request)
        elif _is_ambiguous(request):
            await self._refuse(400, request)
        elif _asks_for_websocket(request):
            # hypercorn would let the app answer, but keep the connection for ever after an invalid handshake.
            await self._refuse(426, request)
        else:
            await super()._create_stream(request)

    async def _refuse(self, status: int, request: h11.Request) -> None:
        await self._send_error_response(status, has_body=request.method != b"HEAD")
        await self.send(Closed())

    async def _send_error_response(self, status_code: int, *, has_body: bool = True) -> None:
        """Refuse a request that is not for the app, in TGI's envelope, and close the connection."""
        text = _REFUSALS.get(status_code, "The request is not valid HTTP/1.1")
        body = b'{"error":"%b","error_type":"validation"}' % text.encode()
        headers = [
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"), *self.config.response_headers("h11"),
        ]  # fmt: skip
        if status_code == 426:
            headers += [(b"connection", b"upgrade"), (b"upgrade", b"HTTP/1.1")]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        if has_body:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


def _is_ambiguous(request: h11.Request) -> bool:
    """Return whether a body has two lengths, so that a proxy may see another end of it (RFC 9112, 6.1)."""
    names = {name for name, _ in request.headers}
    return b"content-length" in names and b"transfer-encoding" in names


def _asks_for_websocket(request: h11.Request) -> bool:
    headers = dict(request.headers)
    options = [each.strip().lower() for each in headers.get(b"connection", b"").split(b",")]
    is_upgrade = request.method == b"GET" and b"upgrade" in options
    return is_upgrade and headers.get(b"upgrade", b"").strip().lower() == b"websocket"


def _size_of(request: h11.Request) -> int:
    """Return the bytes of a request's head."""
    line = len(request.method) + len(request.target) + len(request.http_version) + len("  HTTP/\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in request.headers)
