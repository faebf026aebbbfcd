"""One HTTP request and its answer, which every handler receives.

`app.py` creates it for each request; checks, handlers and the access log share it. It exists so that no layer
has to wrap `send`: a wrapper would cost time for every streamed token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import msgspec
import orjson

from tgi_asgi.api import asgi
from tgi_asgi.api.asgi import JSON, ClientDisconnected, Header, Receive, Scope, Send
from tgi_asgi.api.context import ServerContext
from tgi_asgi.api.errors import Dialect, headers_of
from tgi_asgi.api.parse import decode_json, refuse
from tgi_asgi.api.route_traits import RouteTraits
from tgi_asgi.errors import PayloadTooLarge, UnsupportedMediaType
from tgi_asgi.types import Channel

if TYPE_CHECKING:
    from tgi_asgi.observe.summary import RequestSummary
    from tgi_asgi.types import Lease

P = ParamSpec("P")
T = TypeVar("T")

# Key in ASGI's `extensions` under which a server offers a function that returns whether the client waits for
# `100 Continue`, which such a server sends at the first `receive`.
AWAITS_CONTINUE = "tgi_asgi.awaits_continue"
LARGE_BODY = 32 * 1024  # reading more than this, if in a thousand short messages, takes milliseconds
MANY_JOBS = 32  # and so does making more jobs than this
_MAX_SHOWN = 200  # characters of a path


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class Exchange:
    """A request and the current state of its response.

    Attributes:
        dialect: API whose error envelope is used; a handler may change it after reading the body.
        route: The traits of the matching row of the route table, or None.
        tenant: Name of the API key that the request counts against, if there are keys.
        response_headers: Headers added to any answer (request id, CORS).
        status: Status of the response once it has started, else None.
        channels: The request's engine channels, for the access log and metrics.
        summary: Sizes and times, once they have been read after the end of all channels.
        leases: References to the adapters that it uses.
        error: The exception that ended the request, if any.
        is_disconnected: Whether the client disconnected before the end of the response.
        is_large: Whether handling the body or the answer inline would block the event loop for too long. Set
            when a size becomes known: in `read_body`, and in `life.py` or a handler for later stages.
        large_objects: Holders of many objects, added by their creators: if the exchange is large, freeing
            them would block the event loop, too.
    """

    context: ServerContext
    scope: Scope
    receive: Receive
    send: Send
    dialect: Dialect
    started_s: float = field(default_factory=time.monotonic)
    request_id: str = field(init=False)
    response_headers: list[Header] = field(init=False)
    tenant: str | None = None
    route: RouteTraits | None = None
    status: int | None = None
    channels: list[Channel] = field(default_factory=list)
    summary: RequestSummary | None = None
    leases: list[Lease] = field(default_factory=list)
    error: BaseException | None = None
    is_body_read: bool = False
    is_disconnected: bool = False
    is_large: bool = False
    large_objects: list[object] = field(default_factory=list)
    _num_held: int = 0  # counted bytes of the body and of what was fetched
    _num_image_bytes: int = 0  # counted bytes of decoded images

    def __post_init__(self) -> None:
        self.request_id = asgi.request_id_of(self.scope)
        self.response_headers = [(b"x-request-id", self.request_id.encode("ascii"))]

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """The start of the path, for messages and logs; routes are found by the scope's own."""
        return str(self.scope["path"])[:_MAX_SHOWN]

    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name."""
        return asgi.header(self.scope, name)

    def use(self, dialect: Dialect) -> None:
        """Answer in this dialect, and with the request id in the header that its clients expect."""
        self.dialect = dialect
        if dialect.request_id_header is not None:
            self.response_headers.append((dialect.request_id_header, self.request_id.encode("ascii")))

    async def read_body(self) -> bytes:
        """Read the body, within the server's limit.

        Raises:
            PayloadTooLarge, RequestTimeout, Overloaded, ClientDisconnected: see `asgi.read_body`.
            UnsupportedMediaType: if it is compressed, or (on native routes) not of a JSON type.
        """
        encoding = self.header(b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            raise UnsupportedMediaType("Compressed request bodies are not read; send the JSON as it is")
        if self.route is None or len(self.route.requests) < 2:  # otherwise its kind decides
            self.require_json()
        declared, max_bytes = self.header(b"content-length"), self.context.settings.payload_limit
        if declared is not None and declared.isdigit() and int(declared) > max_bytes:
            raise PayloadTooLarge(f"The request body has {int(declared)} bytes; the limit is {max_bytes}")
        self.is_body_read = True  # from here on, `asgi.read_body` drains what it refuses
        parts = await asgi.read_body(self.receive, max_bytes, self.hold)
        self.is_large |= sum(map(len, parts)) > LARGE_BODY
        return await self.work(b"".join, parts)

    def hold(self, size: int) -> None:
        """Count bytes that arrived for the request, before they are kept.

        Raises:
            Overloaded: if all requests together hold too many.
        """
        self.context.body_budget.acquire(size, self._num_held)
        self._num_held += size

    def hold_image(self, size: int, param: str) -> None:
        """Count bytes of images before they are allocated; a negative size releases bytes.

        Raises:
            Overloaded: if all requests together hold too many.
            InvalidRequest: if this request alone does.
        """
        max_bytes = self.context.settings.max_image_memory
        if size > 0 and self._num_image_bytes + size > max_bytes:
            message = f"`{param}`: decoded, the images of a request may take {max_bytes} bytes together"
            refuse(param, message, "image_too_large")
        if size > 0:
            self.context.image_budget.acquire(size, self._num_image_bytes)
        else:
            self.context.image_budget.release(-size)
        self._num_image_bytes += size

    def close(self) -> None:
        """End the request's generation and release what it held, once; a thread frees large objects."""
        self.cancel_channels()  # an exception may have come between their submission and their delivery
        self.context.body_budget.release(self._num_held)
        self.context.image_budget.release(self._num_image_bytes)
        for lease in self.leases:
            lease.release()
        self.leases.clear()
        large_objects = [*self.large_objects, *self.channels]
        self.large_objects.clear()
        self.channels.clear()  # breaks a cycle: their sinks refer to renderers, which refer to this list
        if self.is_large:
            self.context.text_threads.free(large_objects)

    def require_json(self) -> None:
        """Refuse a body not declared as JSON if the request is TGI's; OpenAI's API accepts any type.

        Raises:
            UnsupportedMediaType: if another content type is declared, or none.
        """
        kind = (self.header(b"content-type") or b"").split(b";", 1)[0].strip().lower()
        is_json = kind == JSON or (kind.startswith(b"application/") and kind.endswith(b"+json"))
        if self.dialect.is_json_only and not is_json:
            raise UnsupportedMediaType("Expected request with `Content-Type: application/json`")

    async def read_json(self, decoder: msgspec.json.Decoder[T]) -> T:
        """Read and decode the body; large ones are decoded in a thread.

        Raises:
            InvalidRequest: if it is not JSON, or not of the decoder's type.
        """
        body = await self.read_body()
        if not body and self.route is not None and not self.route.needs_body:
            body = b"{}"
        return await self.work(decode_json, body, decoder)

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that does no I/O inline, or in a thread if the request is large."""
        if self.is_large:
            return await self.context.text_threads.run_for(self.tenant, function, *args, **kwargs)
        return function(*args, **kwargs)

    async def respond(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Iterable[Header] = ()
    ) -> None:
        """Send the whole response; HEAD requests and 304 responses get only the headers."""
        self.status = status
        size = (b"content-length", b"%d" % len(body))
        all_headers = [(b"content-type", content_type), size, *headers, *self.response_headers]
        # A shared cache may otherwise keep an answer and give it to clients with another key, or with none if
        # the key is in a header that caches do not know (`x-api-key`).
        if self.method in ("GET", "HEAD") and all(name != b"cache-control" for name, _ in all_headers):
            all_headers.append((b"cache-control", b"no-store"))
        await self.send({"type": "http.response.start", "status": status, "headers": all_headers})
        shown = b"" if self.method == "HEAD" or status == 304 else body
        await self.send({"type": "http.response.body", "body": shown, "more_body": False})

    async def respond_json(self, payload: object, status: int = 200, headers: Iterable[Header] = ()) -> None:
        """Send a whole JSON response."""
        await self.respond(status, orjson.dumps(payload), JSON, headers)

    async def fail(self, error: BaseException) -> None:
        """Answer with an error in the route's dialect; the response must not have started."""
        self.cancel_channels()
        self.error = error.with_traceback(None)  # its frames refer to this exchange
        headers = dict(headers_of(error))
        if not self.is_body_read:
            self.is_body_read = True
            if self._awaits_continue():  # and does not send its body then
                headers[b"connection"] = b"close"
            else:
                # While a body is unread, the server does not see disconnects and the client does not see the
                # answer.
                await asgi.drain(asgi.parts_of(self.receive))
        dialect = self.dialect
        dialect.translate(error)
        body = dialect.body(error, self.request_id)
        await self.respond_json(body, dialect.status(error), headers.items())

    def _awaits_continue(self) -> bool:
        """Return whether the client waits for an answer to its headers before it sends the body."""
        is_awaited = (self.scope.get("extensions") or {}).get(AWAITS_CONTINUE)
        return is_awaited is not None and is_awaited()

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Return what some work returns; it is cancelled if the client leaves first.

        Raises:
            ClientDisconnected: if the client left; the request's channels are cancelled, too.
        """
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self.wait_for_disconnect())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():  # its message comes once: nobody else would learn of it
                raise self.note_disconnect()
            return task.result()
        finally:
            watch.cancel()
            # When cancelled, it may end with an error that asyncio would log unless it is retrieved.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            task.cancel()

    async def wait_for_disconnect(self) -> None:
        """Return once the client has disconnected; the body must have been read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def note_disconnect(self) -> ClientDisconnected:
        """Record the disconnect, cancel the request's channels, and return the exception to raise."""
        self.is_disconnected = True
        self.cancel_channels()
        return ClientDisconnected()

    def cancel_channels(self) -> None:
        """Cancel everything that the engine still generates for the request."""
        for channel in self.channels:
            channel.cancel()


Handler = Callable[[Exchange], Awaitable[None]]  # of a route
