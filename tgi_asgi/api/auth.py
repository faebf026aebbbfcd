"""API keys: who may call what.

`app.py` asks before any handler runs. Which routes stay open is a matter of the wire, so it is written here.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from tgi_asgi.errors import ModelLoadError, Unauthorized
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.settings import Settings

# Orchestrators and Prometheus send no key. CORS preflights carry none either: `cors.py` answers them first.
OPEN_ROUTES = frozenset({("GET", "/health"), ("GET", "/ping"), ("GET", "/metrics"), ("GET", "/")})


class ApiKeys:
    """The keys that clients may send as `Authorization: Bearer <key>`; none: everything is open."""

    def __init__(self, keys: Iterable[str], open_paths: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = OPEN_ROUTES | {("GET", path) for path in open_paths}

    @classmethod
    def from_settings(cls, settings: Settings) -> ApiKeys:
        """Take the keys of the flags and of the key file.

        Raises:
            ModelLoadError: the key file cannot be read, or has no key: better no server than an open one.
        """
        keys = list(settings.api_key)
        if settings.api_key_file is not None:
            keys += read_key_file(settings.api_key_file)
        open_paths = (settings.aip_health_route,) if settings.aip_health_route else ()
        return cls(keys, open_paths)

    def check(self, exchange: Exchange) -> None:
        """Let a request pass, or not; note whose key it has.

        Raises:
            Unauthorized: the route needs a key, and the request has none or another.
        """
        if not self._digests:
            return
        method = "GET" if exchange.method == "HEAD" else exchange.method
        path = exchange.path.rstrip("/") or "/"
        if (method, path) in self._open:
            return
        given = exchange.header(b"authorization")
        own = exchange.header(b"x-api-key")  # Anthropic's clients
        if given is None and own is not None:
            given = b"Bearer " + own
        if given is None:
            raise Unauthorized("No API key was given; send it as `Authorization: Bearer <key>`")
        scheme, _, key = given.strip().partition(b" ")
        number = self._number_of(key.strip()) if scheme.lower() == b"bearer" else 0
        if not number:
            raise Unauthorized("The API key is wrong")
        exchange.tenant = f"key {number}"

    def _number_of(self, key: bytes) -> int:
        """Return which of the keys this is, from 1; 0: none of them."""
        # Digests have one length, and every one is compared: time tells neither the key nor its place.
        digest = _digest(key)
        found = 0
        for number, known in enumerate(self._digests, 1):
            found = max(found, number * hmac.compare_digest(digest, known))
        return found


def read_key_file(path: str) -> list[str]:
    """Return the keys of a file: one a line, empty lines and lines that begin with # skipped.

    Raises:
        ModelLoadError: the file cannot be read, or has no key.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"--api-key-file {path}: cannot be read: {error}") from None
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ModelLoadError(f"--api-key-file {path}: has no key in it")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
