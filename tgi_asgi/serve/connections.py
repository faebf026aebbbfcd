"""What hypercorn's connections lack: an end once the client has closed, turns, a limit on one client.

Used by `hypercorn.py` only, which puts these classes in the place of hypercorn's: there is no hook for them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from typing import Any

import h11
from hypercorn.asyncio.tcp_server import MAX_RECV, TCPServer
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol

# No route is known yet, so neither is the dialect.
_BODY = b'{"error":"Too many connections from this address","error_type":"overloaded"}'
_REFUSAL = (
    b"HTTP/1.1 429 \r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)

# How long the last bytes of a connection wait for a reader that has stalled; over TCP the kernel gives it up.
CLOSE_S = 120.0


class Turnstile:
    """Let a few pass in each turn of the event loop, in order.

    A thousand requests that come at once, on connections new or old, would otherwise be parsed and begun in a
    few turns of half a second each, and every stream would stand still meanwhile.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_passed = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait for one's turn."""
        loop = asyncio.get_running_loop()
        if self._num_passed < self._most and not self._waiting:
            self._num_passed += 1
            if self._num_passed == 1:
                loop.call_soon(self._turn, loop)
            return
        future = loop.create_future()
        self._waiting.append(future)
        await future

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_passed = 0
        while self._waiting and self._num_passed < self._most:
            future = self._waiting.popleft()
            if not future.done():  # else its connection was given up
                future.set_result(None)
                self._num_passed += 1
        if self._num_passed or self._waiting:
            loop.call_soon(self._turn, loop)


class ConnectionLimit:
    """Count the open connections of each address; 0 allows any number."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str | None] = Counter()

    def enter(self, address: str | None) -> bool:
        """Count a connection in, unless its address has as many as it may; without one it may always."""
        if self._most and address is not None and self._open[address] >= self._most:
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str | None) -> None:
        """Count one out."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class Connection(TCPServer):
    """One connection.

    hypercorn keeps the socket and three tasks of a connection that the client has closed until its keep-alive
    time is over: 75 s, in which a health check a second leaves 75 behind.
    """

    def __init__(self, limit: ConnectionLimit, turnstile: Turnstile, *args: Any) -> None:
        super().__init__(*args)
        self._limit = limit
        self._turnstile = turnstile
        self._has_gone = False

    async def run(self) -> None:
        peer = self.writer.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else None  # a Unix socket's clients have none
        if not self._limit.enter(address):
            await self._refuse()
            return
        try:
            await super().run()
        except asyncio.CancelledError:
            # The server ends. asyncio's callback of Python 3.11 logs a cancelled connection as an error.
            self.writer.transport.abort()
        finally:
            self._limit.leave(address)

    async def protocol_send(self, event: Event) -> None:
        if not (self._has_gone and isinstance(event, Updated)):  # which would start the keep-alive time again
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        """Do as hypercorn does, but parse in turn; behind the client's end close at once."""
        with contextlib.suppress(OSError):
            while data := await self.reader.read(MAX_RECV):
                await self._turnstile.enter()
                await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())
        self._has_gone = True
        await self.idle_task.stop()

    async def _close(self) -> None:
        abort = self.loop.call_later(CLOSE_S, self.writer.transport.abort)
        # hypercorn lets the kernel's giving up a reader that has stalled (ETIMEDOUT) become a traceback.
        with contextlib.suppress(OSError):
            await super()._close()
        abort.cancel()

    async def _refuse(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self.reader.read(1 << 16)  # a client whose bytes were not read sees a reset, no answer
                self.writer.write(_REFUSAL)
                await self.writer.drain()
        self.writer.close()


class Http1(H11Protocol):
    """HTTP/1 on one connection, and nothing else: hypercorn's HTTP/2 kills those that are answered early."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Change to no other protocol: a wish to upgrade is one that a server may ignore."""

    async def _create_stream(self, request: h11.Request) -> None:
        if request.http_version.startswith(b"1."):
            await super()._create_stream(request)
        else:  # the preface of HTTP/2 by prior knowledge looks like this
            await self._send_error_response(505)
            await self.send(Closed())
