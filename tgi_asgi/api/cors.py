"""Cross-origin requests: preflights, and the headers that let a browser read an answer.

Off unless the administrator configures origins. `app.py` checks this before routing, because a preflight has
no key.
"""

from __future__ import annotations

import re

from tgi_asgi.api.asgi import Header
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.settings import Settings

# Browsers send a list of header names. `*` would not cover Authorization, so the requested names are allowed.
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2048}")
_DEFAULT_HEADERS = b"authorization, content-type, x-request-id"
_EXPOSED = b", ".join(
    (
        b"x-request-id", b"request-id", b"retry-after", b"x-should-retry",
        b"x-compute-type", b"x-compute-time", b"x-compute-characters",
        b"x-total-time", b"x-validation-time", b"x-queue-time", b"x-inference-time", b"x-time-per-token",
        b"x-prompt-tokens", b"x-generated-tokens", b"x-tgi-model", b"x-tgi-ignored-keywords",
    )
)  # fmt: skip


class Cors:
    """The origins that browsers may call from; `*` is any, which was TGI's default."""

    def __init__(self, settings: Settings) -> None:
        origins = settings.cors_allow_origin or ("*",) * settings.tgi_compat
        self._origins = frozenset(origin.rstrip("/").lower().encode() for origin in origins)
        self._is_any = b"*" in self._origins

    def preflight(self, exchange: Exchange) -> list[Header] | None:
        """Return the headers that answer a preflight, or None for any other request.

        Headers that every answer to the request needs are added to its response headers.
        """
        if not self._origins:
            return None
        origin = b"*" if self._is_any else exchange.header(b"origin")
        if not self._is_any:  # caches must not serve one origin's answer to another
            exchange.response_headers.append((b"vary", b"origin"))
        if origin in self._origins:
            exchange.response_headers.append((b"access-control-allow-origin", origin or b""))
            exchange.response_headers.append((b"access-control-expose-headers", _EXPOSED))
        if exchange.method != "OPTIONS" or not exchange.header(b"access-control-request-method"):
            return None
        asked = exchange.header(b"access-control-request-headers") or b""
        allowed = asked if _HEADER_NAMES.fullmatch(asked) else _DEFAULT_HEADERS
        return [
            (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", allowed),
            (b"access-control-max-age", b"86400"),
        ]
