"""What hypercorn's connections lack: an end once the client has closed, and a limit on one client's number.

Used by `server.py` only. hypercorn offers no hook for either, so its class for a connection is replaced in
the module that makes them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Event, Updated

# No route is known yet, so neither is the dialect.
_BODY = b'{"error":"Too many connections from this address","error_type":"overloaded"}'
_REFUSAL = (
    b"HTTP/1.1 429 \r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


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

    class Connection(_Connection):
        def __init__(self, *args: Any) -> None:
            super().__init__(limit, *args)

    hypercorn.asyncio.run.TCPServer = Connection  # type: ignore[attr-defined,assignment]


class _Connection(TCPServer):
    """One connection.

    hypercorn keeps the socket and three tasks of a connection that the client has closed until its keep-alive
    time is over: 75 s, in which a health check a second leaves 75 behind.
    """

    def __init__(self, limit: ConnectionLimit, *args: Any) -> None:
        super().__init__(*args)
        self._limit = limit
        self._has_gone = False

    async def run(self) -> None:
        address = str((self.writer.get_extra_info("peername") or ("",))[0])
        if not self._limit.enter(address):
            await self._refuse()
            return
        try:
            await super().run()
        finally:
            self._limit.leave(address)

    async def protocol_send(self, event: Event) -> None:
        if not (self._has_gone and isinstance(event, Updated)):  # which would start the keep-alive time again
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        await super()._read_data()
        self._has_gone = True
        await self.idle_task.stop()

    async def _refuse(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self.reader.read(1 << 16)  # a client whose bytes were not read sees a reset, no answer
                self.writer.write(_REFUSAL)
                await self.writer.drain()
        self.writer.close()
