"""The ASGI application: combines the routes, starts and stops the model, turns exceptions into responses.

    hypercorn --workers 0 tgi_asgi.app:app         # MODEL_ID and the other settings from the environment
    create_app(Settings(model_id="model.gguf"))    # as the command line and the tests do

Importing this module does not import torch; `assembly.py` does, in the loading thread, if the model needs it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn, Protocol, cast

import orjson

from tgi_asgi import assembly
from tgi_asgi.api import table
from tgi_asgi.api.asgi import JSON, ClientDisconnected, Receive, Scope, Send
from tgi_asgi.api.auth import ApiKeys
from tgi_asgi.api.context import ServerContext
from tgi_asgi.api.cors import Cors
from tgi_asgi.api.errors import NATIVE, OPENAI, headers_of
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.conversation_store import ConversationStore
from tgi_asgi.api.openai.response_store import ResponseStore
from tgi_asgi.api.routes import RouteTable, path_of
from tgi_asgi.api.served import Served
from tgi_asgi.errors import InvalidRequest, ModelLoadError, NoWebSockets, TgiError
from tgi_asgi.observe import logs
from tgi_asgi.observe.access_log import log_access
from tgi_asgi.observe.metrics import LoopLag
from tgi_asgi.observe.summary import RequestSummary
from tgi_asgi.observe.tracing import Tracing
from tgi_asgi.serve.process import FLUSH_S, claim_parent, end_process
from tgi_asgi.settings import Settings
from tgi_asgi.types import Adapters, Engine, Progress

logger = logging.getLogger(__name__)

Loader = Callable[[Settings, Progress], Served]  # runs in a thread; its engine has not been started yet
Observer = Callable[[Exchange, RequestSummary], None]  # called after every response, failed ones included


class OwnedEngine(Engine, Protocol):
    """The engine as its owner sees it: the methods that HTTP does not need."""

    on_fatal: Callable[[TgiError], None] | None

    def start(self) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def stop(self) -> None: ...


class OwnedAdapters(Adapters, Protocol):
    """The adapters as their owner sees them."""

    def start(self) -> Awaitable[None]: ...

    def close(self) -> None: ...


class App:
    """The server as one ASGI callable.

    Attributes:
        context: State shared by the routes; `context.served` is set once the model has loaded.
        on_ready: Called once the engine runs.
        on_fatal: Called with the reason when loading fails, or `FLUSH_S` after the engine dies, so that
            streams can send their last events. The process should then end; until it does, requests get 503.
        has_stopped: Set by `stop`; a loader that waits for others ends then.
        observers: Called in order after each request.
        keys: The API keys that may call.
    """

    def __init__(self, context: ServerContext, loader: Loader) -> None:
        self.context = context
        self.on_ready: Callable[[Served], None] | None = None
        self.on_fatal: Callable[[BaseException], None] | None = None
        self.has_stopped = threading.Event()
        self._cors = Cors(context.settings)
        self.keys = ApiKeys(context.settings)
        self._routes = RouteTable(table.routes(context.settings), self.keys.check)
        self.observers: list[Observer] = [context.metrics.request_ended, log_access]
        self._tracing = Tracing.from_settings(context.settings)
        if self._tracing is not None:
            self.observers.append(self._tracing.request_ended)
        self._loader = loader
        self._lag = LoopLag(context.metrics.loop_lag)
        self._loading: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await _refuse_websocket(scope, send)

    def start(self) -> None:
        """Start loading the model in a thread; return at once."""
        if self._loading is None:
            self._loading = asyncio.get_running_loop().create_task(self._load())
            self._lag.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and let the others finish; at the timeout, end the rest. Needs a model."""
        assert self.context.served is not None
        engine, _ = _owned(self.context.served)
        await engine.drain(timeout_s)

    async def stop(self) -> None:
        """Stop the engine; requests still running end with an error."""
        self.has_stopped.set()
        self._lag.stop()
        if self._loading is not None:
            self._loading.cancel()  # the thread itself lives until the process ends
        if self.context.served is not None:
            engine, adapters = _owned(self.context.served)
            await engine.stop()
            if adapters is not None:
                adapters.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        self.context.close()

    def reload(self) -> None:
        """Reload what may change while the server runs: the API keys of the key file."""
        self.keys.reload()

    async def _load(self) -> None:
        context = self.context
        try:
            served = await asyncio.to_thread(self._loader, context.settings, context.report)
            engine, adapters = _owned(served)
            if adapters is not None:  # adapters named at start-up must answer from the start
                context.report("reading adapters", 0, None)
                await adapters.start()
            context.begin_threads(served)
            engine.on_fatal = self._on_engine_death
            engine.start()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic in a library written in Rust is not an `Exception`
            if isinstance(error, MemoryError):  # of numpy or the extension; where it ran out does not matter
                error = ModelLoadError(f"the system refuses memory for the model: {error or 'none is left'}")
            context.failure = error
            if not isinstance(error, TgiError):
                logger.exception("loading the model failed")
            if self.on_fatal is not None:
                self.on_fatal(error)
            return
        context.metrics.model_loaded(served.info)
        context.served = served
        if self.on_ready is not None:
            self.on_ready(served)

    def _on_engine_death(self, error: TgiError) -> None:
        self.context.failure = error
        if self.on_fatal is not None:
            asyncio.get_running_loop().call_later(FLUSH_S, self.on_fatal, error)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if path != scope["path"]:
            scope = {**scope, "path": path, "root_path": ""}
        exchange = Exchange(self.context, scope, receive, send, NATIVE)
        try:
            await self._answer(exchange)
        except ClientDisconnected:
            exchange.is_disconnected = True
        finally:
            try:
                summary = RequestSummary.of(exchange)
                for observer in self.observers:
                    observer(exchange, summary)
            finally:
                exchange.close()

    async def _answer(self, exchange: Exchange) -> None:
        """Route a request; the only place where exceptions become responses."""
        try:
            preflight = self._cors.preflight(exchange)
            if preflight is not None:
                await exchange.respond(200, b"", headers=preflight)
                return
            await self._routes.handle(exchange)
        except ClientDisconnected:
            raise
        except Exception as error:
            has_begun = exchange.status is not None
            if has_begun or not isinstance(error, TgiError):
                path = logs.quoted(exchange.path)
                logger.exception("request %s: %s %s failed", exchange.request_id, exchange.method, path)
            if has_begun:
                exchange.error = error
                raise  # the server closes the connection
            await exchange.fail(error)


def _owned(served: Served) -> tuple[OwnedEngine, OwnedAdapters | None]:
    """Return the engine and the adapters as their owner sees them; a loader's have these methods."""
    return cast(OwnedEngine, served.engine), cast("OwnedAdapters | None", served.adapters)


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    """Answer a WebSocket's handshake with an error, in the envelope of OpenAI, whose clients open them."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1000})
        return
    error = NoWebSockets("This server has no WebSockets; send the request by HTTP")
    body = orjson.dumps(OPENAI.envelope(error))
    headers = [(b"content-type", JSON), (b"content-length", b"%d" % len(body)), *headers_of(error)]
    status = OPENAI.status(error)
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def create_app(settings: Settings | None = None, loader: Loader | None = None) -> App:
    """Return the application; `loader` replaces the real model in tests. No settings: read the environment.

    Raises:
        InvalidRequest: if a setting does not parse.
        ModelLoadError: if the API key file cannot be read, or a library that a setting needs is missing.
    """
    if settings is None:
        settings = Settings.from_environ()
    stored = settings.response_store
    context = ServerContext(settings, ResponseStore(stored), ConversationStore(stored))
    return App(context, loader or assembly.load_model)


class _EnvironmentApp:
    """`app` for servers that import it by name: reads the environment on the first call."""

    def __init__(self) -> None:
        self._app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            self._app = self._create()
        await self._app(scope, receive, send)

    def _create(self) -> App:
        try:
            claim_parent()
            settings = Settings.from_environ()
            if settings.model_id is None:
                raise ModelLoadError("MODEL_ID is not set: it names the model to serve")
            logs.configure(settings)
            app = create_app(settings)
        except (InvalidRequest, ModelLoadError) as error:
            _exit(error)
        app.on_fatal = functools.partial(_exit, is_logged=settings.json_output)
        return app


def _exit(error: BaseException, *, is_logged: bool = False) -> NoReturn:
    """End the process with code 1: a server that stops normally would exit with 0 and hide the failure."""
    end_process(str(error), 1, is_logged=is_logged)


app = _EnvironmentApp()
