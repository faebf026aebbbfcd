"""The few ASGI operations that routes need: read a body under limits, send a response in one go.

Called by `exchange.py`; knows nothing of dialects, engines or models.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any

from tgi_asgi.errors import Overloaded, PayloadTooLarge, RequestTimeout
from tgi_asgi.settings import MIB

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Coroutine[Any, Any, None]]  # a coroutine function: streams advance it by hand
Header = tuple[bytes, bytes]

JSON = b"application/json"
BODY_TIMEOUT_S = 60.0  # a client that trickles its body holds a connection, nothing else
_DRAIN_BYTES = 32 * MIB
_DRAIN_TIMEOUT_S = 5.0
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # a blank would forge a field of the log


class ClientDisconnected(Exception):
    """Raised inside a request whose client has gone: there is nobody left to answer."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header of that lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def request_id_of(scope: Scope) -> str:
    """Take over the client's `X-Request-Id` of up to 128 visible ASCII characters, else draw one."""
    given = header(scope, b"x-request-id")
    return given.decode("ascii") if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


async def read_body(receive: Receive, scope: Scope, limit: int, hold: Callable[[int], None]) -> list[bytes]:
    """Read the request's whole body, in parts: to join large ones takes milliseconds.

    A body that is too large is refused by its `Content-Length` or as soon as it has grown past the limit; a
    bounded remainder is read and thrown away, because clients that still write do not see an answer.

    Args:
        hold: called with the size of each part before it is kept; may raise `Overloaded`.

    Raises:
        PayloadTooLarge: the body is longer than `limit` bytes.
        RequestTimeout: it did not arrive within a minute.
        ClientDisconnected: the client went away first.
    """
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        await drain(receive)
        raise PayloadTooLarge(f"The request body has {int(declared)} bytes; the limit is {limit}")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    break
                hold(len(part))
                parts.append(part)
                if not message.get("more_body", False):
                    return parts
    except Overloaded:
        parts.clear()
        if message.get("more_body", False):
            await drain(receive)
        raise
    except TimeoutError:
        raise RequestTimeout(f"The request body did not arrive within {BODY_TIMEOUT_S:.0f} seconds") from None
    if message.get("more_body", False):
        await drain(receive)
    raise PayloadTooLarge(f"The request body is longer than the limit of {limit} bytes")


async def drain(receive: Receive) -> None:
    """Throw away what is left of a request's body, up to 32 MiB or 5 seconds.

    Raises:
        ClientDisconnected: the client went away first.
    """
    size = 0
    try:
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            while size < _DRAIN_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def send_bytes(
    send: Send, status: int, body: bytes, content_type: bytes, headers: Iterable[Header] = ()
) -> None:
    """Send a whole response: one start, one body."""
    start_headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode("ascii")),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": start_headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
