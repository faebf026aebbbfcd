"""The listening socket, which is bound before anything else, and an event loop that accepts a few at a time.

Used by `server.py` only. uvloop and asyncio take all connections that wait in one go: of a thousand clients
that come at once that is up to 0.1 s in which every stream stands still. And where file descriptors run out
libuv closes connections that it could take a moment later; here they wait in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
# A reader that never reads blocks `send()` for ever under hypercorn: the kernel ends its connection.
STALLED_READER_MS = 120_000

_A_TURN = 8
_PAUSE_S = 0.1  # until accepting is tried again where file descriptors or memory have run out
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


def listen(settings: Settings) -> socket.socket:
    """Return a listening socket; connections queue from here on, long before torch is imported.

    Raises:
        ModelLoadError: the address is taken, unknown or not ours.
    """
    address: Any
    if settings.uds is not None:
        _remove_stale(Path(settings.uds))
        family, address, name, flags = socket.AF_UNIX, settings.uds, settings.uds, "--uds"
    else:
        family, address = _resolve(settings.hostname, settings.port)
        name, flags = f"{settings.hostname} port {settings.port}", "--host or --port"
    listener = socket.socket(family, socket.SOCK_STREAM)
    if family != socket.AF_UNIX:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Linux hands these on to every accepted connection.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limits = {"TCP_USER_TIMEOUT": STALLED_READER_MS, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10}
        for option in limits.keys() & set(dir(socket)):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), limits[option])
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or error  # a path that is too long has no number
        raise ModelLoadError(f"cannot listen on {name}: {reason}; choose another with {flags}") from None
    return listener


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return what to bind for an address or a name; of a name's addresses IPv4 comes first."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelLoadError(f"--host {host} is no address and no name of this machine: {reason}") from None
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, address


def _remove_stale(path: Path) -> None:
    """Remove the socket that a server has left behind which listens on it no more."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def url_of(listener: socket.socket, *, is_tls: bool) -> str:
    """Return the address as a client on this machine would write it; of a Unix socket `unix:PATH`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.path.abspath(listener.getsockname())}"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(eq=False, slots=True)
class Acceptor:
    """Accepts on a listening socket until it is closed: as much of `asyncio.Server` as hypercorn uses."""

    _loop: asyncio.AbstractEventLoop
    _protocol_factory: ProtocolFactory
    _listener: socket.socket
    _tls: ssl.SSLContext | None = None
    _beginning: set[asyncio.Task[None]] = field(default_factory=set)  # the loop itself holds its tasks weakly
    _resume: asyncio.TimerHandle | None = None
    _has_warned: bool = False

    def __post_init__(self) -> None:
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

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
            await self._loop.connect_accepted_socket(self._protocol_factory, connection, ssl=self._tls)
        except OSError:  # it has gone, or speaks no TLS
            if self._tls is None:  # else its transport has the socket, and may still send an alert
                connection.close()

    def _pause(self, error: OSError) -> None:
        """Leave connections waiting for a moment; the socket would else stay readable and spin the loop."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("connections wait: %s (ulimit -n, or fewer clients)", error.strerror)
        self._loop.remove_reader(self._listener)
        self._resume = self._loop.call_later(_PAUSE_S, self._loop.add_reader, self._listener, self._accept)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's loop, but that its servers on given sockets are `Acceptor`s."""

    class Loop(uvloop.Loop):
        async def create_server(self, *args: Any, sock: Any = None, **options: Any) -> Any:
            if sock is None:
                return await super().create_server(*args, **options)
            return Acceptor(self, args[0], sock, options.get("ssl"))

    return Loop()
