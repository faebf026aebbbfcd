"""Cross-origin requests: preflights, and the headers that let a browser read an answer.

Off unless the operator names origins. `app.py` asks before it routes: a preflight carries no key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tgi_asgi.api.asgi import Header
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.settings import Settings

_METHODS = b"GET, POST, DELETE, OPTIONS"
# Browsers ask with a list of header names; `*` would leave out Authorization, so what is asked is allowed.
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2048}")
_DEFAULT_HEADERS = b"authorization, content-type, x-request-id"
_EXPOSED = b", ".join(
    (
        b"x-request-id", b"retry-after", b"x-compute-type", b"x-compute-time", b"x-compute-characters",
        b"x-total-time", b"x-validation-time", b"x-queue-time", b"x-inference-time", b"x-time-per-token",
        b"x-prompt-tokens", b"x-generated-tokens", b"x-tgi-model", b"x-tgi-ignored-keywords",
    )
)  # fmt: skip
_MAX_AGE_S = b"86400"


class Cors:
    """The origins that browsers may call from; `*` is any."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.rstrip("/").encode() for origin in origins)
        self._is_any = b"*" in self._origins

    @classmethod
    def from_settings(cls, settings: Settings) -> Cors:
        """Take the operator's origins; TGI allowed any where none was given."""
        if settings.tgi_compat and not settings.cors_allow_origin:
            return cls(["*"])
        return cls(settings.cors_allow_origin)

    def preflight(self, exchange: Exchange) -> list[Header] | None:
        """Return the headers that answer a preflight, or None for any other request.

        What any answer to the request needs is added to its headers.
        """
        exchange.response_headers += self._response_headers(exchange)
        return self._preflight_headers(exchange)

    def _response_headers(self, exchange: Exchange) -> list[Header]:
        """Return what every answer to this request carries."""
        if not self._origins:
            return []
        if self._is_any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        # Caches must not give one origin's answer to another, allowed or not.
        headers: list[Header] = [(b"vary", b"origin")]
        origin = exchange.header(b"origin")
        if origin in self._origins:
            headers.append((b"access-control-allow-origin", origin or b""))
            headers.append((b"access-control-expose-headers", _EXPOSED))
        return headers

    def _preflight_headers(self, exchange: Exchange) -> list[Header] | None:
        """Return what a preflight's answer carries besides, or None if the request is none."""
        is_preflight = exchange.method == "OPTIONS" and exchange.header(b"access-control-request-method")
        if not self._origins or not is_preflight:
            return None
        asked = exchange.header(b"access-control-request-headers") or b""
        allowed = asked if _HEADER_NAMES.fullmatch(asked) else _DEFAULT_HEADERS
        return [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", allowed),
            (b"access-control-max-age", _MAX_AGE_S),
        ]
