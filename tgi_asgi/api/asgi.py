"""The few ASGI operations that routes need: headers, and a body with limits.

Used by `exchange.py`; independent of dialects, engines and models.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from tgi_asgi.errors import Overloaded, PayloadTooLarge, RequestTimeout
from tgi_asgi.settings import MIB

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = b"application/json"
BODY_TIMEOUT_S = 60.0  # a client that sends its body slowly only occupies a connection
PART_BYTES = 512  # a body may have one part for each of these
MAX_SMALL_PARTS = 2048  # and as many more: the server spends 20 us on each, however small it is
_DRAIN_BYTES = 32 * MIB
_DRAIN_TIMEOUT_S = 5.0
_DRAIN_IDLE_S = 0.5  # an idle client is waiting for the answer or for `100 Continue`
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # no blanks, which would forge a log field


class ClientDisconnected(Exception):
    """Raised inside a request whose client has disconnected, so there is no one to answer."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header with this lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def request_id_of(scope: Scope) -> str:
    """Return the client's `X-Request-Id` of up to 128 visible ASCII characters, otherwise a random one."""
    given = header(scope, b"x-request-id")
    return given.decode("ascii") if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


async def parts_of(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the rest of a request's body.

    Raises:
        ClientDisconnected: if the client disconnects before its end.
    """
    has_more = True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        has_more = message.get("more_body", False)
        yield message.get("body", b"")


async def read_body(receive: Receive, limit: int, hold: Callable[[int], None]) -> list[bytes]:
    """Read the request's whole body, in parts, because joining large ones takes milliseconds.

    A body that is too large is refused as soon as it exceeds the limit. A bounded remainder is read and
    discarded, because clients that are still writing do not see an answer.

    Args:
        hold: Called with the size of each part before it is kept; may raise `Overloaded`.

    Raises:
        PayloadTooLarge: if the body is longer than `limit` bytes, or comes in too many small parts.
        RequestTimeout: if it does not arrive within a minute.
        ClientDisconnected: if the client disconnects first.
    """
    kept: list[bytes] = []
    size = num_parts = 0
    parts = parts_of(receive)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in parts:
                size, num_parts = size + len(part), num_parts + 1
                if size > limit:
                    raise PayloadTooLarge(f"The request body is longer than the limit of {limit} bytes")
                if has_small_parts(num_parts, size):
                    small = f"chunks of less than {PART_BYTES} bytes"
                    raise PayloadTooLarge(f"The request body has more than {MAX_SMALL_PARTS} {small}")
                hold(len(part))
                kept.append(part)
    except (Overloaded, PayloadTooLarge):
        kept.clear()
        await drain(parts)
        raise
    except TimeoutError:
        raise RequestTimeout(f"The request body did not arrive within {BODY_TIMEOUT_S:.0f} seconds") from None
    return kept


def has_small_parts(num_parts: int, size: int) -> bool:
    """Return whether so many bytes of a body came in more parts than they may."""
    return num_parts - size // PART_BYTES > MAX_SMALL_PARTS


async def drain(parts: AsyncIterator[bytes]) -> None:
    """Discard the rest of a request's body: at most 32 MiB, for 5 seconds, while data keeps arriving.

    Small parts are discarded only as far as `read_body` would read them.

    Raises:
        ClientDisconnected: if the client disconnects first.
    """
    size, num_parts, now = 0, 0, asyncio.get_running_loop().time
    ends_s = now() + _DRAIN_TIMEOUT_S
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as limit:
            limit.reschedule(now() + _DRAIN_IDLE_S)
            async for part in parts:
                size, num_parts = size + len(part), num_parts + 1
                if size >= _DRAIN_BYTES or has_small_parts(num_parts, size):
                    return
                limit.reschedule(min(ends_s, now() + _DRAIN_IDLE_S))
