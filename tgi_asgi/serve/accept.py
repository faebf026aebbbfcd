"""An event loop that accepts connections a few a turn, whatever their number.

Used by `server.py` only. uvloop and asyncio take all that wait in one go: of a thousand clients that come at
once that is up to 0.1 s in which every stream stands still. And where file descriptors run out libuv closes
connections that it could take a moment later; here they wait in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_A_TURN = 8
_PAUSE_S = 0.1  # until accepting is tried again where file descriptors or memory have run out
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class Acceptor:
    """Accepts on a listening socket until it is closed: as much of `asyncio.Server` as hypercorn uses."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, protocol_factory: ProtocolFactory, listener: socket.socket
    ) -> None:
        self._loop = loop
        self._protocol_factory = protocol_factory
        self._listener = listener
        self._beginning: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks weakly
        self._resume: asyncio.TimerHandle | None = None
        self._has_warned = False
        listener.setblocking(False)
        loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accept nothing more and close the listener; what was accepted stays open. Idempotent."""
        if self._resume is not None:
            self._resume.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Return: `close` waits for nothing."""

    def _accept(self) -> None:
        for _ in range(_A_TURN):
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # that connection has failed already, the next one need not
                self._pause(error)
                return
            task = self._loop.create_task(self._begin(connection))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(self._protocol_factory, connection)
        except OSError:  # it has gone
            connection.close()

    def _pause(self, error: OSError) -> None:
        """Leave connections waiting for a moment; the socket would else stay readable and spin the loop."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("connections wait: %s (ulimit -n, or fewer clients)", error.strerror)
        self._loop.remove_reader(self._listener)
        self._resume = self._loop.call_later(_PAUSE_S, self._loop.add_reader, self._listener, self._accept)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a loop (uvloop's, if it is there) whose servers on given sockets without TLS are `Acceptor`s."""
    base: Any = asyncio.SelectorEventLoop
    with contextlib.suppress(ImportError):
        import uvloop

        base = uvloop.Loop

    class Loop(base):  # type: ignore[misc]
        async def create_server(
            self, protocol_factory: ProtocolFactory, *args: Any, sock: Any = None, **options: Any
        ) -> Any:
            if sock is None or options.get("ssl") is not None:
                return await super().create_server(protocol_factory, *args, **options)
            return Acceptor(self, protocol_factory, sock)

    return Loop()
