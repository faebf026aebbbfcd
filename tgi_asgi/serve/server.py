"""The native server: hypercorn on a socket bound first, a drain on SIGTERM, correct exit codes.

Called only by `cli.py`; the app does not depend on it and also runs under other servers.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable
from functools import partial
from typing import NoReturn, cast

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.typing import ASGIFramework

from tgi_asgi.api.served import Served
from tgi_asgi.app import Loader, create_app
from tgi_asgi.assembly import load_model
from tgi_asgi.errors import ModelLoadError, TgiError
from tgi_asgi.serve.connections import ConnectionLimit
from tgi_asgi.serve.console import Console
from tgi_asgi.serve.hypercorn import ServerConfig, install, make_config
from tgi_asgi.serve.listening import listen, new_event_loop, url_of
from tgi_asgi.serve.notify import notify
from tgi_asgi.serve.process import end_process, raise_file_limit, shorten_waits_for_gil
from tgi_asgi.settings import Settings
from tgi_asgi.types import Progress

logger = logging.getLogger(__name__)

CLOSE_S = 5.0
# A signal this soon after the first is the same: GNU timeout sends it to the process and to its group, and
# a wrapper passes on what the terminal has sent to all.
_ECHO_S = 1.0


def run(settings: Settings, loader: Loader = load_model) -> int:
    """Serve until a signal or a fatal error; return the exit code (0 after a drain).

    Raises:
        ModelLoadError: if the address, the certificate or the installed hypercorn cannot be used, or the
            model cannot be loaded.
        TgiError: if the engine has died.
    """
    raise_file_limit()
    shorten_waits_for_gil()
    listener = listen(settings)
    url = url_of(listener, is_tls=settings.ssl_certfile is not None)
    config = make_config(listener, settings)
    limit = ConnectionLimit(settings.max_connections_per_client)
    with asyncio.Runner(loop_factory=partial(new_event_loop, limit)) as runner:
        return runner.run(Server(settings, url, loader).serve(config, limit))


class Server:
    """One run: the app, and its reaction to signals, a failed load and a dead engine."""

    def __init__(self, settings: Settings, url: str, loader: Loader) -> None:
        self._settings = settings
        self._loader = loader
        self._url = url
        self._console = Console(settings)
        self._app = create_app(settings, self._load)
        self._app.on_ready = self._on_ready
        self._app.on_fatal = self._on_fatal
        self._stop = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._signalled_at = 0.0  # by the loop's clock
        self._stage = ""

    async def serve(self, config: ServerConfig, limit: ConnectionLimit) -> int:
        """Serve as configured until the process is to end; return its exit code."""
        self.handle_signals(config.reload_certificate)
        install(limit)
        app = cast(ASGIFramework, self._app)  # hypercorn types each message, ASGI uses a mapping
        await hypercorn_serve(app, config, shutdown_trigger=self._stop.wait, mode="asgi")
        failure = self._app.context.failure
        if failure is None:
            return 0
        if isinstance(failure, TgiError):
            raise failure
        raise ModelLoadError(f"{type(failure).__name__}: {failure}") from failure

    def handle_signals(self, reload_certificate: Callable[[], None]) -> None:
        """Drain on SIGTERM and SIGINT; on SIGHUP, read the API keys and the certificate again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

        def reload() -> None:
            self._app.reload()
            reload_certificate()

        loop.add_signal_handler(signal.SIGHUP, reload)

    def _load(self, settings: Settings, progress: Progress) -> Served:
        def report(stage: str, done: int, total: int | None) -> None:
            progress(stage, done, total)
            self._console.report(stage, done, total)
            if stage != self._stage:
                self._stage = stage
                notify(f"STATUS={stage}")

        return self._loader(settings, report)

    def _on_ready(self, served: Served) -> None:
        gc.freeze()  # objects made by loading stay; collections need not scan them again
        gc.set_threshold(700, 10, 50)  # a full collection stops the loop for 25 ms per thousand clients
        notify("READY=1", f"STATUS=serving {served.info.model_id} at {self._url}")
        self._console.summarise(served.info, self._url, has_chat=served.chat_template is not None)

    def _on_fatal(self, error: BaseException) -> None:
        """Stop because the model could not be loaded or the engine has died."""
        self._console.close()
        self._close()

    def _on_signal(self, number: int) -> None:
        if self._app.context.served is None:
            self._console.close()
            if number == signal.SIGINT:
                self._end(None, 128 + number)
            self._end("stopped while loading", 0)
        loop = asyncio.get_running_loop()
        if self._drain is not None:
            if loop.time() >= self._signalled_at + _ECHO_S:
                self._end("stopped by a second signal", 128 + number)
            return
        self._signalled_at = loop.time()
        notify("STOPPING=1", "STATUS=finishing running requests")
        delay_s = self._settings.drain_delay_s if number == signal.SIGTERM else 0.0
        self._app.context.is_terminating = True
        self._drain = loop.create_task(self._drain_and_stop(delay_s))

    async def _drain_and_stop(self, delay_s: float) -> None:
        """Accept requests for `delay_s`, then refuse them; fail those that do not finish in time."""
        if delay_s:
            logger.info("shutting down: accepting requests for another %g s", delay_s)
            await asyncio.sleep(delay_s)
        timeout_s = self._settings.graceful_termination_timeout
        logger.info("draining for up to %d s; another signal stops at once", timeout_s)
        try:
            await self._app.drain(timeout_s)
        finally:
            if self._app.context.failure is None:  # a dead engine is drained, too: `_on_fatal` is called soon
                self._close()

    def _close(self) -> None:
        """Let hypercorn close, then end the process even if a connection or a step hangs."""
        self._stop.set()
        asyncio.get_running_loop().call_later(CLOSE_S, self._give_up)

    def _give_up(self) -> None:
        failure = self._app.context.failure
        self._end(None if failure is None else str(failure), int(failure is not None))

    def _end(self, reason: str | None, code: int) -> NoReturn:
        end_process(reason, code, is_logged=self._settings.json_output)
