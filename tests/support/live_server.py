"""An app of this process served by hypercorn on a real socket, for clients that cannot call an app directly.

with LiveServer(scripted_app(engine)) as server:
    requests.get(server.url + "/info")
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, cast

from hypercorn.asyncio import serve
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from tgi_asgi.app import App

_START_TIMEOUT_S = 30.0


class LiveServer:
    """Serve the app that `make` returns, in a thread with its own loop, as an engine belongs to one loop."""

    def __init__(self, make: Callable[[], App]) -> None:
        self._make = make
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._listener = listener.detach()  # hypercorn closes it
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_TIMEOUT_S)
        assert not self._thread.is_alive(), "the server did not stop"

    def _run(self) -> None:
        config = Config()
        config.bind = [f"fd://{self._listener}"]
        config.graceful_timeout = 1
        config.errorlog = None
        asyncio.set_event_loop(self._loop)
        app = cast(ASGIFramework, self._make())
        self._loop.run_until_complete(serve(app, config, shutdown_trigger=self._stop.wait))
        self._loop.close()
