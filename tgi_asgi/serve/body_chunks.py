"""A short way for the chunks of a stream under hypercorn, which makes six calls and two events of each.

Used by `server.py` only. hypercorn's class for a request is replaced where its HTTP/1.1 protocol makes them;
HTTP/2 keeps its own. What goes the short way is `http.response.body` with more to follow, where the body is
chunked and the connection can take it at once. h11 keeps no account of such chunks, so the head of a
response, its end, waiting for a slow reader and all that can go wrong remain hypercorn's. A streamed token
costs a third less (bench/README.md).
"""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import Any

import h11
import hypercorn.protocol.h11
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = ("0.18.",)  # of hypercorn: its source was read for what the short way leaves out


def install() -> None:
    """Let hypercorn send chunks like this from now on, in this process, if its version is known."""
    found = version("hypercorn")
    if found.startswith(KNOWN_VERSIONS):
        hypercorn.protocol.h11.HTTPStream = _Stream  # type: ignore[attr-defined]
    else:
        logger.warning("hypercorn %s is not known here: its own, slower way sends the streams", found)


class _Stream(HTTPStream):
    """One request and its response."""

    _transport: asyncio.WriteTransport | None = None  # once the response has begun, if its body is chunked
    _low_water = 0

    async def app_send(self, message: Any) -> None:
        if (
            message is not None
            and message["type"] == "http.response.body"
            and message.get("more_body", False)
            and self._write_now(message.get("body", b""))
        ):
            return
        await super().app_send(message)
        if message is not None and message["type"] == "http.response.start":
            self._transport = self._find_transport()
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
            or transport.get_write_buffer_size() > self._low_water
            or transport.is_closing()
        ):
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def _find_transport(self) -> asyncio.WriteTransport | None:
        """Return the connection's transport, if h11 sends this response in chunks and all is as expected."""
        protocol = getattr(self.send, "__self__", None)
        if not isinstance(protocol, H11Protocol) or not isinstance(protocol.connection, h11.Connection):
            return None
        server = getattr(protocol.send, "__self__", None)
        # h11 sends none for HEAD and CONNECT, some statuses, old clients, and where a length is given.
        if (
            isinstance(server, TCPServer)
            and self.scope["method"] in ("GET", "POST")
            and self.scope["http_version"] == "1.1"
            and self.response["status"] == 200
            and not any(name.lower() == b"content-length" for name, _ in self.response.get("headers", ()))
        ):
            return server.writer.transport
        return None
