"""A row says all about one method of one path; a table of them finds the row of a request.

The rows themselves are in `table.py`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette import routing

from tgi_asgi.api.asgi import Receive, Scope, Send
from tgi_asgi.api.errors import NATIVE, OPENAI, Dialect
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.errors import MethodNotAllowed, NotFound

Handler = Callable[[Exchange], Awaitable[None]]
Check = Callable[[Exchange], None]

_SLASHES = re.compile("//+")
_EXCHANGE = "tgi_asgi.exchange"  # the scope's key under which endpoints find theirs


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
        requests: the types that the body may have; of several its main field tells which, and whether errors
            have TGI's envelope or OpenAI's.
        response: the type of a 200, of JSON or else of `media_type`; None: it has no body.
        event: the type of what a stream's events or lines hold, if the request can ask for a stream.
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
    requests: Sequence[type] = ()
    response: Any = Any
    media_type: str = "application/json"
    event: type | None = None
    stream_type: str = "text/event-stream"


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
        """Refuse a path that no route has, as the routes beside it would; there may be some below /v1."""
        exchange: Exchange = scope.pop(_EXCHANGE)
        where = f"{exchange.method} {exchange.path}"
        folder = "/" + exchange.path.lstrip("/").partition("/")[0]
        row, hint = self._row_in(folder), ""
        if row is None and (row := self._row_in(f"/v1{folder}")):
            hint = f". Add /v1 to the base URL: /v1{exchange.path}"
        elif exchange.path.startswith("/v1/v1/"):
            hint = f". Take /v1 from the base URL: {exchange.path[3:]}"
        dialect = row.dialect if row is not None else NATIVE
        exchange.dialect = _spoken(dialect, exchange)
        self._check(exchange)  # a wrong key is not told whether the path exists
        exchange.dialect = dialect
        raise NotFound(f"{'No route' if dialect is NATIVE else 'Unknown URL:'} {where}{hint}")

    def _row_in(self, folder: str) -> Route | None:
        return next((row for row in self.rows if f"{row.path}/".startswith(f"{folder}/")), None)


class _Endpoint:
    """The ASGI app of one path; its errors are answered by `app.py`."""

    def __init__(self, rows: dict[str, Route], check: Check) -> None:
        self._rows = rows
        self._check = check

    async def __call__(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        exchange: Exchange = scope.pop(_EXCHANGE)  # which has the scope: a cycle would keep both
        row = self._rows.get("GET" if exchange.method == "HEAD" else exchange.method)
        any_row = row or next(iter(self._rows.values()))
        exchange.dialect = dialect = _spoken(any_row.dialect, exchange)
        if dialect.request_id_header is not None:
            exchange.response_headers.append((dialect.request_id_header, exchange.request_id.encode("ascii")))
        exchange.route = row
        self._check(exchange)
        if row is None:
            allow = [*self._rows, *(("HEAD",) if "GET" in self._rows else ())]
            raise MethodNotAllowed(
                f"Method {exchange.method} is not allowed for {exchange.path}; use {' or '.join(allow)}",
                allow=tuple(allow),
            )
        await row.handle(exchange)


def _spoken(dialect: Dialect, exchange: Exchange) -> Dialect:
    is_openai = dialect.envelope is OPENAI.envelope
    return NATIVE if is_openai and exchange.context.settings.tgi_compat else dialect


def path_of(target: str) -> str:
    """Return the path that a request's target names: without slashes at its end, nor scheme and host.

    Clients of proxies send these (RFC 9112, section 3.2.2). Of several slashes one counts: clients put them
    between a base URL that ends with one and their path.
    """
    if not target.startswith("/"):
        _, scheme_ends, rest = target.partition("://")
        target = "/" + rest.partition("/")[2] if scheme_ends else target
    return _SLASHES.sub("/", target).rstrip("/") or "/"
