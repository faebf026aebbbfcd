"""A fast path for the chunks of a stream under hypercorn, which spends six calls and two events on each.

Used only by `hypercorn.py`, which installs `Stream` instead of hypercorn's class for a request. The app finds
the fast path in its scope. It applies to `http.response.body` messages with more to follow, if the body is
chunked and the connection can take the chunk at once; the return value says whether it was used. h11 keeps no
state for such chunks. The head of a response, its end, waiting for a slow reader and all error handling
therefore stay with hypercorn. A streamed token costs a third less (bench/README.md).
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import Any

import h11
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from tgi_asgi.api.sse import DIRECT_WRITE
from tgi_asgi.serve.continues import continuing


class Stream(HTTPStream):
    """One request and its response."""

    _transport: asyncio.WriteTransport

    async def handle(self, event: Any) -> None:
        if isinstance(event, Request) and (protocol := self._find_protocol()) is not None:
            self.app = continuing(self.app, protocol)
        await super().handle(event)  # creates the scope, and a task for the app that has not started yet
        if isinstance(event, Request) and (transport := self._find_transport()) is not None:
            self._transport, self._low_water = transport, transport.get_write_buffer_limits()[0]
            self.scope["extensions"][DIRECT_WRITE] = self.write_now  # type: ignore[assignment]

    def write_now(self, body: bytes) -> bool:
        """Write one chunk, framed as h11 does, and return True; return False if hypercorn must write it.

        A transport that has paused its writers resumes them below the low water mark, so no check is needed
        below it.
        """
        if (
            not body  # an empty chunk would end the body
            or self.state is not ASGIHTTPState.RESPONSE
            or self.closed  # the client has disconnected
            or not self._is_chunked
            or self._transport.get_write_buffer_size() > self._low_water
            or self._transport.is_closing()
        ):
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    @cached_property
    def _is_chunked(self) -> bool:
        """Whether h11 sends this response in chunks, which it does not for some statuses or with a length."""
        names = (name.lower() for name, _ in self.response.get("headers", ()))
        return self.response["status"] == 200 and b"content-length" not in names

    def _find_protocol(self) -> H11Protocol | None:
        """Return hypercorn's side of this connection, or None if its protocol is not HTTP/1."""
        protocol = getattr(self.send, "__self__", None)
        is_http1 = isinstance(protocol, H11Protocol) and isinstance(protocol.connection, h11.Connection)
        return protocol if is_http1 else None

    def _find_transport(self) -> asyncio.WriteTransport | None:
        """Return the transport of hypercorn's connection if this response may be chunked, else None."""
        server = getattr(getattr(self._find_protocol(), "send", None), "__self__", None)
        is_chunkable = self.scope["method"] in ("GET", "POST") and self.scope["http_version"] == "1.1"
        return server.writer.transport if isinstance(server, TCPServer) and is_chunkable else None
