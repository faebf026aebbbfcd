"""A short way for the chunks of a stream under hypercorn, which makes six calls and two events of each.

Used by `hypercorn.py` only, which replaces hypercorn's class for a request. What goes the short way is
`http.response.body` with more to follow, where the body is chunked and the connection can take it at once.
h11 keeps no account of such chunks, so the head of a response, its end, waiting for a slow reader and all
that can go wrong remain hypercorn's. A streamed token costs a third less (bench/README.md).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.events import Request
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

# In `scope["extensions"]` where `send` may be advanced by hand, outside of the request's task, for which
# ours never asks. A middleware's may, and leaves the extension there: it names the `send` that is meant.
DIRECT_SEND = "tgi_asgi.direct_send"


class Stream(HTTPStream):
    """One request and its response."""

    _connection: asyncio.WriteTransport | None = None  # if h11 may send this response in chunks
    _transport: asyncio.WriteTransport | None = None  # the same, once the response has begun and is chunked
    _low_water = 0

    async def handle(self, event: Any) -> None:
        await super().handle(event)  # makes the scope, and a task for the app that has not run yet
        if isinstance(event, Request):
            self._connection = self._find_connection()
            if self._connection is not None:
                self.scope["extensions"][DIRECT_SEND] = {"send": self.app_send}

    async def app_send(self, message: Any) -> None:
        if (
            message is not None
            and message["type"] == "http.response.body"
            and message.get("more_body", False)
            and self._write_now(message.get("body", b""))
        ):
            return
        await super().app_send(message)
        if message is not None and message["type"] == "http.response.start" and self._is_chunked():
            self._transport = self._connection
            if self._transport is not None:
                self._low_water = self._transport.get_write_buffer_limits()[0]

    def _write_now(self, body: bytes) -> bool:
        """Write one chunk, framed as h11 does, where hypercorn would write it without waiting; say whether.

        A transport that has asked its writers to wait lets them go on below the low water mark, so below it
        there is no need to ask.
        """
        transport = self._transport
        if (
            transport is None
            or not body  # as a chunk that would be the end
            or self.state is not ASGIHTTPState.RESPONSE
            or self.closed  # the client has gone
            or transport.get_write_buffer_size() > self._low_water
            or transport.is_closing()
        ):
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def _find_connection(self) -> asyncio.WriteTransport | None:
        """Return the transport of hypercorn's connection, if this request may be answered in chunks."""
        protocol = getattr(self.send, "__self__", None)
        if not isinstance(protocol, H11Protocol) or not isinstance(protocol.connection, h11.Connection):
            return None
        server = getattr(protocol.send, "__self__", None)
        is_chunkable = self.scope["method"] in ("GET", "POST") and self.scope["http_version"] == "1.1"
        return server.writer.transport if isinstance(server, TCPServer) and is_chunkable else None

    def _is_chunked(self) -> bool:
        """Return whether h11 sends this response in chunks: not with some statuses or a length."""
        names = (name.lower() for name, _ in self.response.get("headers", ()))
        return self.response["status"] == 200 and b"content-length" not in names
