"""Routes: which handler a path and method reach, and which dialect a path's errors speak.

Each feature module has a `routes()` that returns what `route()` makes; `app.py` puts them together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.routing import Route

from tgi_asgi.errors import MethodNotAllowed, NotFound
from tgi_asgi.http.asgi import Receive, Scope, Send
from tgi_asgi.http.errors import Dialect
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.settings import Settings

Handler = Callable[[Exchange], Awaitable[None]]

EXCHANGE = "tgi_asgi.exchange"  # the scope's key under which handlers find theirs
_FORGOT_V1 = ("/chat/completions", "/completions", "/models", "/responses")


@dataclass(frozen=True, slots=True)
class RouteInfo:
    """What metrics and the log know of a route."""

    path: str  # the pattern
    generates: bool = False  # a POST makes text
    is_quiet: bool = False  # a GET is a probe or a scrape: not worth a line while all is well


def route(
    path: str,
    *,
    get: Handler | None = None,
    post: Handler | None = None,
    generates: bool = False,
    is_quiet: bool = False,
) -> Route:
    """Return the route of one path; HEAD is answered by `get`, other methods by a 405."""
    handlers = {"GET": get, "HEAD": get, "POST": post}
    info = RouteInfo(path, generates, is_quiet)
    return Route(path, _Endpoint(info, {method: h for method, h in handlers.items() if h is not None}))


class _Endpoint:
    """The ASGI app of one path; its errors are answered by `app.py`."""

    def __init__(self, info: RouteInfo, handlers: dict[str, Handler]) -> None:
        self._info = info
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[EXCHANGE]
        exchange.route = self._info
        handler = self._handlers.get(scope["method"])
        if handler is None:
            allow = tuple(self._handlers)
            raise MethodNotAllowed(
                f"Method {scope['method']} is not allowed for {scope['path']}; use {' or '.join(allow)}",
                allow=allow,
            )
        await handler(exchange)


def path_of(target: str) -> str:
    """Return the path that a request's target names: without slashes at its end, nor scheme and host.

    Clients of proxies send these (RFC 9112, section 3.2.2).
    """
    if not target.startswith("/"):
        _, scheme_ends, rest = target.partition("://")
        target = "/" + rest.partition("/")[2] if scheme_ends else target
    return target.rstrip("/") or "/"


def dialect_of(path: str, settings: Settings) -> Dialect:
    """Return whose envelope the errors of a path have, before its body has been seen."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    if path.startswith(_FORGOT_V1):
        return Dialect.OPENAI
    is_openai = path == "/v1" or path.startswith("/v1/")
    return Dialect.OPENAI if is_openai and not settings.tgi_compat else Dialect.NATIVE


async def not_found(scope: Scope, _receive: object, _send: object) -> None:
    """Refuse a path that no route has."""
    exchange: Exchange = scope[EXCHANGE]
    path = exchange.path
    if path == "/v1" or path.startswith("/v1/"):
        exchange.dialect = Dialect.OPENAI
        raise NotFound(f"Unknown URL: {exchange.method} {path}")
    if path.startswith(_FORGOT_V1):
        raise NotFound(f"Unknown URL: {exchange.method} {path}. Add /v1 to the base URL: /v1{path}")
    raise NotFound(f"No route {exchange.method} {path}")
