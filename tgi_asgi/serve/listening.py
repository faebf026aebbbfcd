"""The listening socket, bound before anything else, and an event loop that accepts a few clients at a time.

Used only by `server.py`. uvloop and asyncio accept all waiting connections in one go: if a thousand clients
connect at once, every stream stalls for up to 0.1 s. When file descriptors run out, libuv closes connections
that it could accept a moment later; here they wait in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve.connections import ConnectionLimit, address_of
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
# Under hypercorn, a client that never reads blocks `send()` forever; after this time the kernel ends its
# connection.
STALLED_READER_MS = 120_000

_MAX_PER_TURN = 8
_PAUSE_S = 0.1  # delay before accepting again after file descriptors or memory ran out
# File descriptors that connections leave for keys, adapters, modules and the hosts of images. Without them,
# an administrator could not withdraw the key of a client that holds all connections.
_NUM_RESERVED = 64
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


def listen(settings: Settings) -> socket.socket:
    """Return a listening socket; connections queue from here on, long before torch is imported.

    Raises:
        ModelLoadError: if the address is taken, unknown or not this machine's.
    """
    address: Any
    if settings.uds is not None:
        family, address, name, flags = socket.AF_UNIX, settings.uds, settings.uds, "--uds"
    else:
        family, address = _resolve(settings.hostname, settings.port)
        name, flags = f"{settings.hostname} port {settings.port}", "--host or --port"
    listener = socket.socket(family, socket.SOCK_STREAM)
    if family != socket.AF_UNIX:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Linux copies these options to every accepted connection.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limits = {"TCP_USER_TIMEOUT": STALLED_READER_MS, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10}
        for option in limits.keys() & set(dir(socket)):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), limits[option])
    try:
        if settings.uds is not None:
            _remove_stale(Path(settings.uds))
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or error  # an OSError for an overlong path has no strerror
        raise ModelLoadError(f"cannot listen on {name}: {reason}; choose another with {flags}") from None
    return listener


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return the family and address to bind for an address or a name; prefer a name's IPv4 addresses."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelLoadError(f"--host {host} is not an address or name of this machine: {reason}") from None
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, address


def _remove_stale(path: Path) -> None:
    """Remove a socket left by a server that no longer listens on it.

    Raises:
        OSError: if the path cannot be looked at.
    """
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def url_of(listener: socket.socket, *, is_tls: bool) -> str:
    """Return the URL that a client on this machine would use; for a Unix socket `unix:PATH`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.path.abspath(listener.getsockname())}"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(eq=False, slots=True)
class Acceptor:
    """Accepts on a listening socket until closed; implements what hypercorn uses of `asyncio.Server`."""

    _loop: asyncio.AbstractEventLoop
    _protocol_factory: ProtocolFactory
    _listener: socket.socket
    _limit: ConnectionLimit
    _tls: ssl.SSLContext | None = None
    _beginning: set[asyncio.Task[None]] = field(default_factory=set)  # the loop holds its tasks only weakly
    _resume: asyncio.TimerHandle | None = None
    _has_warned: bool = False
    _max_descriptors: int = 0

    def __post_init__(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = sys.maxsize if limit == resource.RLIM_INFINITY else limit
        self._max_descriptors = limit - min(_NUM_RESERVED, limit // 4)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Stop accepting and close the listener; accepted connections stay open. Idempotent."""
        if self._resume is not None:
            self._resume.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Return at once, because `close` waits for nothing."""

    def _accept(self) -> None:
        for _ in range(_MAX_PER_TURN):
            try:
                self._check_descriptors()
                connection, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # this connection has failed already; the next may not
                self._pause(error)
                return
            task = self._loop.create_task(self._begin(connection, peer))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    def _check_descriptors(self) -> None:
        """Raise an OSError if the next connection would have one of the reserved file descriptors."""
        lowest_free = os.dup(self._listener.fileno())
        os.close(lowest_free)
        if lowest_free >= self._max_descriptors:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def _begin(self, connection: socket.socket, peer: object) -> None:
        connect, begin = self._loop.connect_accepted_socket, self._protocol_factory
        connection.setblocking(False)
        if self._tls is None:
            try:
                await connect(begin, connection)
            except OSError:  # the client has gone
                connection.close()
            return
        # The transport owns the socket and may still send an alert, even if the client does not speak TLS.
        with (
            self._limit.handshake(address_of(peer)) as time_s,
            contextlib.suppress(OSError),
        ):
            await connect(begin, connection, ssl=self._tls, ssl_handshake_timeout=time_s)

    def _pause(self, error: OSError) -> None:
        """Stop accepting for a moment; otherwise the socket would stay readable and the loop would spin."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("connections wait: %s (raise ulimit -n or reduce clients)", error.strerror)
        self._loop.remove_reader(self._listener)
        self._resume = self._loop.call_later(_PAUSE_S, self._loop.add_reader, self._listener, self._accept)


def new_event_loop(limit: ConnectionLimit | None = None) -> asyncio.AbstractEventLoop:
    """Return a uvloop event loop whose servers on given sockets are `Acceptor`s with this limit."""
    shared = limit or ConnectionLimit(0)

    class Loop(uvloop.Loop):
        async def create_server(self, *args: Any, sock: Any = None, **options: Any) -> Any:
            if sock is None:
                return await super().create_server(*args, **options)
            return Acceptor(self, args[0], sock, shared, options.get("ssl"))

    return Loop()
