"""Serve an app on a real socket of this process: plain hypercorn, the server's hypercorn, or uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from types import ModuleType
from typing import Any, cast
from urllib.parse import urlsplit

import hypercorn.asyncio
import hypercorn.asyncio.run
import hypercorn.protocol.h11
import pytest
from hypercorn.config import Config

from tests.support.waiting import LONGEST_S
from tgi_asgi.api.asgi import Receive, Scope, Send
from tgi_asgi.serve.connections import ConnectionLimit
from tgi_asgi.serve.hypercorn import install, make_config
from tgi_asgi.serve.listening import listen, url_of
from tgi_asgi.settings import Settings

App = Callable[[Scope, Receive, Send], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LOCAL = Settings(hostname="127.0.0.1", port=0)
REPLACED: tuple[tuple[ModuleType, str], ...] = (  # where hypercorn looks up replaced classes
    (hypercorn.asyncio.run, "TCPServer"),
    (hypercorn.protocol, "H11Protocol"),
    (hypercorn.protocol.h11, "HTTPStream"),
)


@contextlib.contextmanager
def restored_hypercorn() -> Iterator[pytest.MonkeyPatch]:
    """Restore hypercorn's own classes at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in REPLACED:
            patch.setattr(module, name, getattr(module, name))
        yield patch


@asynccontextmanager
async def serving(
    app: App,
    server: str = "native",
    settings: Settings = LOCAL,
    *,
    send_buffer: int | None = None,
    limit: ConnectionLimit | None = None,
) -> AsyncIterator[str]:
    """Yield the app's base URL.

    `server` is "hypercorn", "native" (hypercorn with the project's classes, as `server.py` runs it) or
    "uvicorn". `settings` define where it listens. `send_buffer` limits what the kernel buffers for a slow
    reader; `limit` is that of open connections.
    """
    listener = listen(settings)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.setblocking(False)
    url = url_of(listener, is_tls=settings.ssl_certfile is not None)
    stop = asyncio.Event()
    with restored_hypercorn():
        if server == "native":
            install(limit or ConnectionLimit(0))
        running = (
            _uvicorn(app, listener, stop)
            if server == "uvicorn"
            else _hypercorn(app, make_config(listener, settings), stop)
        )
        task = asyncio.create_task(running)
        try:
            yield url
        finally:
            stop.set()
            await asyncio.wait_for(task, LONGEST_S)
            listener.close()


async def connect(url: str, tls: ssl.SSLContext | None = None, *, is_slow: bool = False) -> Streams:
    """Open a connection to the URL of `serving`; with `is_slow`, receive buffers are small."""
    is_unix = url.startswith("unix:")
    parts = urlsplit(url)
    raw = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
    if is_slow:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    address = url.removeprefix("unix:") if is_unix else (parts.hostname, parts.port)
    await asyncio.get_running_loop().sock_connect(raw, address)
    name = parts.hostname if tls is not None else None
    return await asyncio.open_connection(
        sock=raw, ssl=tls, server_hostname=name, limit=1024 if is_slow else 1 << 16
    )


async def _hypercorn(app: App, config: Config, stop: asyncio.Event) -> None:
    config.errorlog = None

    async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] != "lifespan"  # the scripted model is already there; a lifespan would load it
        await app(scope, receive, send)

    await hypercorn.asyncio.serve(cast(Any, without_lifespan), config, shutdown_trigger=stop.wait)


async def _uvicorn(app: App, listener: socket.socket, stop: asyncio.Event) -> None:
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, lifespan="off", log_level="critical", timeout_graceful_shutdown=1)
    )
    server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]
    serve = asyncio.create_task(server.serve([listener]))
    await stop.wait()
    server.should_exit = True
    await serve
