"""Serve an app on a real socket of this process, under hypercorn (as it is, or as we run it) or uvicorn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, cast

import hypercorn.asyncio
import hypercorn.config
import hypercorn.protocol.h11
import pytest

from tgi_asgi.api.asgi import Receive, Scope, Send
from tgi_asgi.serve import body_chunks

App = Callable[[Scope, Receive, Send], Awaitable[None]]


@asynccontextmanager
async def serving(app: App, server: str = "ours", *, send_buffer: int | None = None) -> AsyncIterator[str]:
    """Yield the app's base URL.

    `server` is "hypercorn", "ours" (hypercorn with the short way for chunks, as `server.py` runs it) or
    "uvicorn"; `send_buffer` bounds what the kernel keeps for a reader that lags.
    """
    listener = socket.socket()
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    listener.setblocking(False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    # The scripted model is there already; a lifespan would load it.
    run = _uvicorn if server == "uvicorn" else _hypercorn
    stop = asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:
        if server == "ours":
            patch.setattr(
                hypercorn.protocol.h11, "HTTPStream", hypercorn.protocol.h11.HTTPStream
            )  # to restore
            body_chunks.install()
        task = asyncio.create_task(run(app, listener, stop))
        try:
            yield url
        finally:
            stop.set()
            await asyncio.wait_for(task, 20)
            listener.close()


async def _hypercorn(app: App, listener: socket.socket, stop: asyncio.Event) -> None:
    config = hypercorn.config.Config()
    config.bind = [f"fd://{listener.detach()}"]  # hypercorn closes it
    config.graceful_timeout = 0.5
    config.loglevel = "CRITICAL"

    async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] != "lifespan"
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
