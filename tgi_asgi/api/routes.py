"""A row says all about one method of one path; a table of them finds the row of a request.

The rows themselves are in `table.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from starlette import routing

from tgi_asgi.api.asgi import Receive, Scope, Send
from tgi_asgi.api.errors import NATIVE, OPENAI, Dialect
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.errors import MethodNotAllowed, NotFound

Handler = Callable[[Exchange], Awaitable[None]]
Check = Callable[[Exchange], None]

_EXCHANGE = "tgi_asgi.exchange"  # the scope's key under which endpoints find theirs
_FORGOT_V1 = ("/chat/completions", "/completions", "/models", "/responses")


class Access(enum.Enum):
    """Who may call a route, once there are API keys."""

    OPEN = "open"  # anybody: orchestrators and Prometheus send no key
    KEY = "key"
    ADMIN = "admin"  # only the operator's own key, always


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    Attributes:
        dialect: whose envelope errors have; in the compatible mode OpenAI's routes have TGI's.
        generates: it makes text, and counts as a request in the metrics.
        is_quiet: a probe or a scrape, worth a line of the log only when it fails.
        summary: for the OpenAPI document; "" leaves the route out of it.
        requests: the types that the body may have.
        response: of a 200, where it is a struct; else any JSON object.
        is_list: the response is an array of `response`.
        streams: it answers with a stream, where the request asks for that.
        stream_type: the stream's media type.
        event: the JSON of one of those, where it is a struct.
        media_type: of a response that is not JSON; "": there is no body.
        is_by_key: the body's main field tells whose envelope errors have, TGI's or OpenAI's.
    """

    method: str
    path: str
    handle: Handler
    summary: str = ""
    tag: str = "Server"
    dialect: Dialect = NATIVE
    access: Access = Access.KEY
    generates: bool = False
    is_quiet: bool = False
    requests: tuple[type, ...] = ()
    response: type | None = None
    is_list: bool = False
    streams: bool = False
    stream_type: str = "text/event-stream"
    event: type | None = None
    media_type: str = "application/json"
    is_by_key: bool = False


class RouteTable:
    """All routes of a server.

    Args:
        check: called with each request before its handler, also where no route matches; may refuse it.
    """

    def __init__(self, rows: Iterable[Route], check: Check) -> None:
        self.rows = list(rows)
        self._check = check
        by_path: dict[str, dict[str, Route]] = {}
        for row in self.rows:
            by_path.setdefault(row.path, {})[row.method] = row
        endpoints = [routing.Route(path, _Endpoint(own, check)) for path, own in by_path.items()]
        self._router = routing.Router(endpoints, redirect_slashes=False, default=self._not_found)

    async def handle(self, exchange: Exchange) -> None:
        """Find the request's route and let it answer.

        Raises:
            NotFound, MethodNotAllowed: there is none.
        """
        exchange.scope[_EXCHANGE] = exchange
        await self._router(exchange.scope, exchange.receive, exchange.send)

    async def _not_found(self, scope: Scope, _receive: object, _send: object) -> None:
        """Refuse a path that no route has; a wrong key is not told whether it exists."""
        exchange: Exchange = scope.pop(_EXCHANGE)
        path = exchange.path
        is_openai = path == "/v1" or path.startswith("/v1/")
        is_compat = exchange.context.settings.tgi_compat
        exchange.dialect = OPENAI if path.startswith(_FORGOT_V1) or (is_openai and not is_compat) else NATIVE
        self._check(exchange)
        if is_openai:
            exchange.dialect = OPENAI
            raise NotFound(f"Unknown URL: {exchange.method} {path}")
        if path.startswith(_FORGOT_V1):
            raise NotFound(f"Unknown URL: {exchange.method} {path}. Add /v1 to the base URL: /v1{path}")
        raise NotFound(f"No route {exchange.method} {path}")


class _Endpoint:
    """The ASGI app of one path; its errors are answered by `app.py`."""

    def __init__(self, rows: dict[str, Route], check: Check) -> None:
        self._rows = rows
        self._check = check

    async def __call__(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        exchange: Exchange = scope.pop(_EXCHANGE)  # which has the scope: a cycle would keep both
        row = self._rows.get("GET" if exchange.method == "HEAD" else exchange.method)
        any_row = row or next(iter(self._rows.values()))
        dialect = any_row.dialect
        is_openai = dialect.envelope is OPENAI.envelope
        exchange.dialect = NATIVE if is_openai and exchange.context.settings.tgi_compat else dialect
        exchange.route = row
        self._check(exchange)
        if row is None:
            allow = [*self._rows, *(("HEAD",) if "GET" in self._rows else ())]
            raise MethodNotAllowed(
                f"Method {exchange.method} is not allowed for {exchange.path}; use {' or '.join(allow)}",
                allow=tuple(allow),
            )
        await row.handle(exchange)


def path_of(target: str) -> str:
    """Return the path that a request's target names: without slashes at its end, nor scheme and host.

    Clients of proxies send these (RFC 9112, section 3.2.2).
    """
    if not target.startswith("/"):
        _, scheme_ends, rest = target.partition("://")
        target = "/" + rest.partition("/")[2] if scheme_ends else target
    return target.rstrip("/") or "/"
