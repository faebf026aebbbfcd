"""What hypercorn's connections lack: an end once the client has closed, turns, and a limit on one client.

Used by `server.py` only. hypercorn offers no hook for these, so its class for a connection is replaced in
the module that makes them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from typing import Any

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import MAX_RECV, TCPServer
from hypercorn.events import Closed, Event, RawData, Updated

# No route is known yet, so neither is the dialect.
_BODY = b'{"error":"Too many connections from this address","error_type":"overloaded"}'
_REFUSAL = (
    b"HTTP/1.1 429 \r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


_A_TURN = 8  # reads that are parsed in one turn of the event loop


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
        self._open: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Count a connection in, unless the address has as many as it may."""
        if self._most and self._open[address] >= self._most:
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Count one out."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def install(limit: ConnectionLimit) -> None:
    """Let hypercorn make connections of this kind from now on, in this process."""
    turnstile = Turnstile(_A_TURN)

    class Connection(_Connection):
        def __init__(self, *args: Any) -> None:
            super().__init__(limit, turnstile, *args)

    hypercorn.asyncio.run.TCPServer = Connection  # type: ignore[attr-defined,assignment]


class _Connection(TCPServer):
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
        address = str((self.writer.get_extra_info("peername") or ("",))[0])
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
        # hypercorn lets the kernel's giving up a reader that has stalled (ETIMEDOUT) become a traceback.
        with contextlib.suppress(OSError):
            await super()._close()

    async def _refuse(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self.reader.read(1 << 16)  # a client whose bytes were not read sees a reset, no answer
                self.writer.write(_REFUSAL)
                await self.writer.drain()
        self.writer.close()
