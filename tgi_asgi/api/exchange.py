"""One HTTP request and its answer: what every handler gets.

Made by `app.py` for each request; checks, handlers and the access log share it. It exists so that no layer
has to wrap `send`: a wrapper would cost every streamed token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import msgspec
import orjson

from tgi_asgi.api import asgi
from tgi_asgi.api.asgi import JSON, ClientDisconnected, Header, Receive, Scope, Send
from tgi_asgi.api.context import ServerContext
from tgi_asgi.api.errors import Dialect, headers_of
from tgi_asgi.api.parse import decode_json
from tgi_asgi.errors import InvalidRequest, UnsupportedMediaType
from tgi_asgi.types import Channel

if TYPE_CHECKING:
    from tgi_asgi.api.routes import Route
    from tgi_asgi.types import Lease

P = ParamSpec("P")
T = TypeVar("T")

LARGE_BODY = 32 * 1024  # reading more than this, of a thousand short messages, takes milliseconds


class Exchange:
    """A request, and the response as far as it has come.

    Attributes:
        dialect: whose envelope an error gets; a handler may change it once it has seen the body.
        route: the row of the table that matched, or None.
        tenant: whom the request is counted for, where there are API keys.
        response_headers: added to whatever is answered (request id, CORS).
        status: of the response once it has started, else None.
        channels: the engine's channels of this request, for the access log and metrics.
        leases: of the adapters that it uses.
        error: what went wrong, if anything did.
        is_disconnected: the client left before the response had ended.
        is_large: handling the body or the answer at once would keep the event loop for too long; set by
            whoever learns of a size: `read_body`, and `life.py` or a handler for what follows from it.
        remains: what holds objects that are many, added by whoever makes them: where the exchange is large,
            to free them would keep the loop, too.
    """

    __slots__ = (
        "__weakref__", "_num_held", "_num_image_bytes", "channels", "context", "dialect", "error",
        "is_body_read", "is_disconnected", "is_large", "leases", "receive", "remains", "request_id",
        "response_headers", "route", "scope", "send", "started_s", "status", "tenant",
    )  # fmt: skip

    def __init__(
        self, context: ServerContext, scope: Scope, receive: Receive, send: Send, dialect: Dialect
    ) -> None:
        self.context = context
        self.scope = scope
        self.receive = receive
        self.send = send
        self.dialect = dialect
        self.tenant: str | None = None
        self.request_id = asgi.request_id_of(scope)
        self.response_headers: list[Header] = [(b"x-request-id", self.request_id.encode("ascii"))]
        self.started_s = time.monotonic()
        self.status: int | None = None
        self.route: Route | None = None
        self.channels: list[Channel] = []
        self.leases: list[Lease] = []
        self.error: BaseException | None = None
        self._num_held = 0  # bytes of the body, and of what it had fetched, that are counted as held
        self._num_image_bytes = 0  # likewise, of images that have been decoded
        self.is_body_read = False
        self.is_disconnected = False
        self.is_large = False
        self.remains: list[object] = []

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name."""
        return asgi.header(self.scope, name)

    async def read_body(self) -> bytes:
        """Read the body under the server's limit.

        Raises:
            PayloadTooLarge, RequestTimeout, Overloaded, ClientDisconnected: see `asgi.read_body`.
            UnsupportedMediaType: it is compressed, or (native routes) not of a JSON type.
        """
        encoding = self.header(b"content-encoding")
        if encoding not in (None, b"", b"identity"):
            raise UnsupportedMediaType("Compressed request bodies are not read; send the JSON as it is")
        if self.route is None or len(self.route.requests) < 2:  # else its kind decides
            self.require_json()
        self.is_body_read = True  # from here on read_body drains what it refuses
        declared, most = self.header(b"content-length"), self.context.settings.payload_limit
        parts = await asgi.read_body(self.receive, declared, most, self.hold)
        self.is_large |= sum(map(len, parts)) > LARGE_BODY
        return await self.work(b"".join, parts)

    def hold(self, size: int) -> None:
        """Count bytes that came for the request, before they are kept.

        Raises:
            Overloaded: all requests together hold too many.
        """
        self.context.bodies.take(size, self._num_held)
        self._num_held += size

    def hold_image(self, size: int, param: str) -> None:
        """Count bytes of images before they are taken; fewer than none are given back.

        Raises:
            Overloaded: all requests together hold too many.
            InvalidRequest: this one alone does.
        """
        most = self.context.settings.max_image_memory
        if size > 0 and self._num_image_bytes + size > most:
            message = f"`{param}`: decoded, the images of a request may take {most} bytes together"
            raise InvalidRequest(message, param=param, code="image_too_large")
        if size > 0:
            self.context.pixels.take(size, self._num_image_bytes)
        else:
            self.context.pixels.give_back(-size)
        self._num_image_bytes += size

    def close(self) -> None:
        """Let go of all that the request held, once; what is large is freed in a thread."""
        self.context.bodies.give_back(self._num_held)
        self.context.pixels.give_back(self._num_image_bytes)
        for lease in self.leases:
            lease.release()
        self.leases.clear()
        remains = [*self.remains, *self.channels]
        self.remains.clear()
        self.channels.clear()  # their sinks know whom they render for, who knows this list
        if self.is_large:
            self.context.text.free(remains)

    def require_json(self) -> None:
        """Refuse a body that is not declared to be JSON, where the request is TGI's: OpenAI takes any type.

        Raises:
            UnsupportedMediaType: it is declared to be something else, or nothing.
        """
        kind = (self.header(b"content-type") or b"").split(b";", 1)[0].strip().lower()
        is_json = kind == JSON or (kind.startswith(b"application/") and kind.endswith(b"+json"))
        if self.dialect.is_json_only and not is_json:
            raise UnsupportedMediaType("Expected request with `Content-Type: application/json`")

    async def read_json(self, decoder: msgspec.json.Decoder[T]) -> T:
        """Read and decode the body; large ones are decoded in a thread.

        Raises:
            InvalidRequest: it is no JSON, or not of the decoder's type.
        """
        body = await self.read_body()
        return await self.work(decode_json, body, decoder)

    async def work(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a pure function of the request at once, or in a thread if the body was large."""
        if self.is_large:
            return await self.context.text.run(function, *args, **kwargs)
        return function(*args, **kwargs)

    async def respond(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Iterable[Header] = ()
    ) -> None:
        """Send the whole response; a HEAD request, and who has the body (304), get the headers alone."""
        self.status = status
        size = (b"content-length", b"%d" % len(body))
        all_headers = [(b"content-type", content_type), size, *headers, *self.response_headers]
        await self.send({"type": "http.response.start", "status": status, "headers": all_headers})
        shown = b"" if self.method == "HEAD" or status == 304 else body
        await self.send({"type": "http.response.body", "body": shown, "more_body": False})

    async def respond_json(self, payload: object, status: int = 200, headers: Iterable[Header] = ()) -> None:
        """Send a whole JSON response."""
        await self.respond(status, orjson.dumps(payload), JSON, headers)

    async def fail(self, error: BaseException) -> None:
        """Answer with an error in the route's dialect; the response must not have started."""
        self.error = error.with_traceback(None)  # its frames hold this exchange
        if not self.is_body_read:
            # An unread body hides disconnects from us and our answer from the client.
            self.is_body_read = True
            await asgi.drain(asgi.parts_of(self.receive))
        dialect = self.dialect
        dialect.tell(error)
        await self.respond_json(dialect.envelope(error), dialect.status(error), headers_of(error))

    async def wait_for_disconnect(self) -> None:
        """Return when the client has gone; the body must have been read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def disconnect(self) -> ClientDisconnected:
        """Note that the client has gone, give the request's channels up, and return what to raise."""
        self.is_disconnected = True
        self.give_up()
        return ClientDisconnected()

    def give_up(self) -> None:
        """Cancel what the engine still generates for the request."""
        for channel in self.channels:
            channel.cancel()
