"""Route rows, each describing one method of one path, and the table that finds a request's row.

The rows themselves are in `table.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette import routing

from tgi_asgi.api.asgi import Receive, Scope, Send
from tgi_asgi.api.errors import NATIVE, Dialect
from tgi_asgi.api.exchange import Exchange, Handler
from tgi_asgi.api.route_traits import RouteTraits
from tgi_asgi.errors import MethodNotAllowed, NotFound

Check = Callable[[Exchange], None]

# In the `User-Agent` of Hugging Face's clients, which expect TGI's errors on /v1, too. After a 400,
# huggingface_hub 0.23 takes the server for one without chats. Until 0.25 it fails on an error that is an
# object, and later versions show the object, as the JavaScript client does.
_TGI_CLIENTS = (b"hf_hub/", b"@huggingface/inference/")
_SLASHES = re.compile("//+")
_MAX_FOLDERS = 4  # of an unknown path that are compared with the routes: a path may have thousands
_EXCHANGE = "tgi_asgi.exchange"  # key in the scope for the endpoint's exchange


@dataclass(frozen=True, slots=True)
class Route(RouteTraits):
    """A row of the table: the handler of one method of one path, and how it is documented.

    Attributes:
        dialect: API whose error envelope is used; in compatibility mode, OpenAI's routes use TGI's.
        other_dialect: API of those clients that send its `client_header`, if two APIs have the route.
        summary: Summary in the OpenAPI document; "" omits the route from it.
        response: Type of a 200 response in JSON or in `media_type`; None: no body.
        event: Type of the data in a stream's events or lines, if the request can ask for a stream.
    """

    handle: Handler
    summary: str = ""
    tag: str = "Server"
    dialect: Dialect = NATIVE
    other_dialect: Dialect | None = None
    response: Any = Any
    media_type: str = "application/json"
    event: type | None = None
    stream_type: str = "text/event-stream"

    def dialect_for(self, exchange: Exchange) -> Dialect:
        """Return the API whose client sent the request."""
        other = self.other_dialect
        if other is None or other.client_header is None or exchange.header(other.client_header) is None:
            return self.dialect
        return other


class RouteTable:
    """All routes of a server.

    Args:
        check: Called with each request before its handler, even if no route matches; may refuse it.
    """

    def __init__(self, rows: Iterable[Route], check: Check) -> None:
        self.rows = list(rows)
        self._check = check
        by_path: dict[str, dict[str, Route]] = {}
        for row in self.rows:
            by_path.setdefault(row.path, {})[row.method] = row
        endpoints = {path: _Endpoint(own, check) for path, own in by_path.items()}
        with_parameters = [routing.Route(path, app) for path, app in endpoints.items() if "{" in path]
        self._exact = {path: app for path, app in endpoints.items() if "{" not in path}
        self._router = routing.Router(with_parameters, redirect_slashes=False, default=self._not_found)

    async def handle(self, exchange: Exchange) -> None:
        """Find the request's route and run its handler.

        Raises:
            NotFound, MethodNotAllowed: if there is none.
        """
        scope = exchange.scope
        scope[_EXCHANGE] = exchange
        await self._exact.get(scope["path"], self._router)(scope, exchange.receive, exchange.send)

    async def _not_found(self, scope: Scope, _receive: object, _send: object) -> None:
        """Refuse an unknown path in the dialect of neighbouring routes; suggest another base URL."""
        exchange: Exchange = scope.pop(_EXCHANGE)
        path, hint = exchange.path, ""
        before, _, rest = path.rpartition("/v1/")  # /openai/v1/models, as of Groq's and Azure's clients
        if before and self._neighbour_of(f"/v1/{rest}", num_folders=2):
            path = f"/v1/{rest}"
            hint = f". Take {before} from the base URL: {path}"
        row = self._neighbour_of(path)
        if row is None and (row := self._neighbour_of(f"/v1{path}", num_folders=2)):
            hint = f". Add /v1 to the base URL: /v1{path}"
        dialect = row.dialect if row is not None else NATIVE
        if dialect.is_openai:  # paths below /v1 are not only OpenAI's
            others = ((row.dialect, row.dialect.client_header) for row in self.rows)
            sent = (each for each, name in others if name is not None and exchange.header(name) is not None)
            dialect = next(sent, dialect)
        dialect = _effective_dialect(dialect, exchange)
        exchange.use(dialect)
        self._check(exchange)  # with a wrong key, do not reveal whether the path exists
        start = "No route" if dialect is NATIVE else "Unknown URL:"
        raise NotFound(f"{start} {exchange.method} {exchange.path}{hint}")

    def _neighbour_of(self, path: str, num_folders: int = 1) -> Route | None:
        """Return a route that shares most folders with a path, at least the first `num_folders`, or None."""
        folders = path.split("/", _MAX_FOLDERS + 1)[1 : _MAX_FOLDERS + 1]
        for size in range(len(folders), num_folders - 1, -1):
            shared = "".join(f"/{folder}" for folder in folders[:size])
            for row in self.rows:
                if f"{row.path}/".startswith(f"{shared}/"):
                    return row
        return None


class _Endpoint:
    """The ASGI app of one path; `app.py` handles its errors."""

    def __init__(self, rows: dict[str, Route], check: Check) -> None:
        self._rows = rows
        self._check = check

    async def __call__(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        exchange: Exchange = scope.pop(_EXCHANGE)  # the exchange refers to the scope, so this avoids a cycle
        row = self._rows.get("GET" if exchange.method == "HEAD" else exchange.method)
        any_row = row or next(iter(self._rows.values()))
        exchange.use(_effective_dialect(any_row.dialect_for(exchange), exchange))
        exchange.route = row
        self._check(exchange)
        if row is None:
            allow = [*self._rows, *(("HEAD",) if "GET" in self._rows else ())]
            raise MethodNotAllowed(
                f"Method {exchange.method} is not allowed for {exchange.path}; use {' or '.join(allow)}",
                allow=tuple(allow),
            )
        await row.handle(exchange)


def _effective_dialect(dialect: Dialect, exchange: Exchange) -> Dialect:
    """Return the dialect of an answer, which may differ from its route's."""
    if not dialect.is_openai:
        return dialect
    if exchange.context.settings.tgi_compat:
        return NATIVE
    agent = exchange.header(b"user-agent") or b""
    return dialect.with_tgi_errors() if any(name in agent for name in _TGI_CLIENTS) else dialect


def path_of(scope: Scope) -> str:
    """Return a request's path below the prefix where the app is mounted, without trailing slashes.

    Clients of proxies send targets with scheme and host (RFC 9112, section 3.2.2). Repeated slashes count as
    one, because clients join a base URL with a trailing slash and a path.
    """
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if not path.startswith("/"):
        _, scheme_ends, rest = path.partition("://")
        path = "/" + rest.partition("/")[2] if scheme_ends else path
    path = _SLASHES.sub("/", path).rstrip("/")
    if f"{path}/".startswith(f"{root}/"):
        path = path[len(root) :]
    return path or "/"
