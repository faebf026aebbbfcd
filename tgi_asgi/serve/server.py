"""Our own serving: hypercorn on a socket that is bound first, a drain on SIGTERM, true exit codes.

Called by `cli.py` only; the app knows nothing of it and runs under other servers as well.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
from typing import Protocol, cast

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from tgi_asgi.api.context import Served
from tgi_asgi.app import Loader, create_app, load_model
from tgi_asgi.errors import ModelLoadError, TgiError
from tgi_asgi.serve import accept, body_chunks, connections
from tgi_asgi.serve.console import Console
from tgi_asgi.serve.process import end_process
from tgi_asgi.settings import Settings
from tgi_asgi.types import Progress

logger = logging.getLogger(__name__)

BACKLOG = 2048
MAX_FILES = 65536
KEEP_ALIVE_S = 75  # over the 60 s of common load balancers, which else reuse a connection as it closes
# A reader that never reads blocks `send()` for ever under hypercorn: the kernel ends its connection.
STALLED_READER_MS = 120_000
CLOSE_S = 5.0
FLUSH_S = 1.0  # what the last events of a stream get to leave, once nothing more is generated


class _Drainable(Protocol):
    """What our engine has beside what HTTP needs."""

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those that run; end the rest with an error."""


def run(settings: Settings, loader: Loader = load_model) -> int:
    """Serve until a signal or a fatal error; return the exit code (0 after a drain).

    Raises:
        ModelLoadError: the address cannot be listened on, or the model cannot be loaded.
        TgiError: the engine has died.
    """
    _raise_file_limit()
    sys.setswitchinterval(0.001)  # a thread that wants the GIL back waits 1 ms, not 4.4 (p90 under load)
    listener = listen(settings)
    with asyncio.Runner(loop_factory=accept.new_event_loop) as runner:
        return runner.run(_Server(settings, listener, loader).serve())


def listen(settings: Settings) -> socket.socket:
    """Return a listening socket; connections queue from here on, long before torch is imported.

    Raises:
        ModelLoadError: the address is taken or not ours.
    """
    address = settings.bind_address
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Linux hands these on to every accepted connection.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_USER_TIMEOUT", STALLED_READER_MS), ("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        listener.bind((address, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ModelLoadError(
            f"cannot listen on {address} port {settings.port}: {error.strerror}; choose another with --port"
        ) from None
    return listener


def make_config(listener: socket.socket) -> Config:
    """Return hypercorn's configuration for long streams; its defaults are for short answers."""
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.backlog = BACKLOG
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.keep_alive_max_requests = 1 << 31
    config.max_app_queue_size = 100
    config.graceful_timeout = FLUSH_S  # our drain has ended before hypercorn begins to close
    config.shutdown_timeout = 10
    config.h11_max_incomplete_size = 64 << 10
    config.alpn_protocols = ["http/1.1"]  # its HTTP/2 kills connections answered before the upload ends
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    config.loglevel = "WARNING"
    config.accesslog = None
    return config


class _Server:
    """One run: the app, and what signals, a failed load or a dead engine do to it."""

    def __init__(self, settings: Settings, listener: socket.socket, loader: Loader) -> None:
        self._settings = settings
        self._loader = loader
        self._listener = listener
        self._url = _url(listener)
        self._console = Console(settings)
        self._app = create_app(settings, self._load)
        self._app.on_ready = self._on_ready
        self._app.on_fatal = self._on_fatal
        self._stop = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        body_chunks.install()
        connections.install(connections.ConnectionLimit(self._settings.max_connections_per_client))
        app = cast(ASGIFramework, self._app)  # hypercorn types each message; ASGI's own type is a mapping
        await hypercorn_serve(app, make_config(self._listener), shutdown_trigger=self._stop.wait, mode="asgi")
        if self._failure is None:
            return 0
        if isinstance(self._failure, TgiError):
            raise self._failure
        raise ModelLoadError(f"{type(self._failure).__name__}: {self._failure}") from self._failure

    def _load(self, settings: Settings, progress: Progress) -> Served:
        def report(stage: str, done: int, total: int | None) -> None:
            progress(stage, done, total)
            self._console.report(stage, done, total)

        return self._loader(settings, report)

    def _on_ready(self, served: Served) -> None:
        gc.freeze()  # what loading made stays: no collection need walk it again
        gc.set_threshold(700, 10, 50)  # a full collection stops the loop for 25 ms per thousand clients
        self._console.summarise(served.info, self._url, has_chat=served.chat_template is not None)

    def _on_fatal(self, error: BaseException) -> None:
        """Stop because the model could not be loaded, or the engine has died."""
        self._console.close()
        self._failure = error
        self._close(str(error), 1)

    def _on_signal(self, number: int) -> None:
        if self._app.context.served is None:
            self._console.close()
            end_process("stopped while loading", 0)
        if self._drain is not None:
            end_process("stopped by a second signal", 128 + number)
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_stop(self._app.context.served))

    async def _drain_and_stop(self, served: Served) -> None:
        """Refuse new requests, let those that run finish, end the rest with an error event."""
        timeout_s = self._settings.graceful_termination_timeout
        logger.info("draining for up to %d s; a second signal ends at once", timeout_s)
        try:
            await cast(_Drainable, served.engine).drain(timeout_s)
        finally:
            self._close(None, 0)

    def _close(self, reason: str | None, code: int) -> None:
        """Let hypercorn close; a connection or a step that hangs must not keep the process."""
        self._stop.set()
        asyncio.get_running_loop().call_later(CLOSE_S, end_process, reason, code)


def _url(listener: socket.socket) -> str:
    """Return the address as a client on this machine would write it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_file_limit() -> None:
    """Take as many file descriptors as the system grants, up to `MAX_FILES`: each connection is one.

    Shells and container runtimes give 1,024 by default, for programs that use `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
