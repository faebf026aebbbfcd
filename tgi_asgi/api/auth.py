"""API keys: who may call what, and how often. The route table checks them before any handler runs."""

from __future__ import annotations

import hmac
import logging
import secrets
from pathlib import Path
from time import monotonic

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.page.files import wants_html
from tgi_asgi.api.route_traits import Access
from tgi_asgi.errors import ModelLoadError, Overloaded, Unauthorized
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

_OTHER_HEADERS = (b"x-api-key", b"api-key")  # sent by Anthropic's clients, and by OpenAI's for Azure


class ApiKeys:
    """The keys that clients may send as `Authorization: Bearer <key>`, or in a header of `_OTHER_HEADERS`.

    Without keys, everything is open.

    Raises:
        ModelLoadError: if the key file cannot be read or is empty, so that the server does not run open.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._numbered: dict[bytes, str] = {}  # for unnamed keys; a number is never reused for another key
        self._secret = secrets.token_bytes(32)
        self._names = self._read()  # by the key's digest
        self._admin = self._digest(settings.admin_api_key.encode()) if settings.admin_api_key else None
        self._buckets: dict[str, tuple[float, float]] = {}  # by name: remaining requests, and as of when

    def check(self, exchange: Exchange) -> None:
        """Admit a request or raise, and record the tenant of its key.

        Raises:
            Unauthorized: if the route needs a key and the request has none or a wrong one.
            Overloaded: if the key has used up its requests for now.
        """
        route = exchange.route
        access = route.access if route is not None else Access.KEY
        if access is Access.ADMIN:
            assert self._admin is not None, "admin routes exist only with an admin key"
            if not hmac.compare_digest(self._digest(_key_of(exchange)), self._admin):
                raise Unauthorized("The admin API key is wrong")
        elif self._names and not _is_open(access, exchange):
            exchange.tenant = self._names.get(self._digest(_key_of(exchange)))
            if exchange.tenant is None:
                raise Unauthorized("The API key is wrong")
            if route is not None and route.generates:
                self._count(exchange.tenant)

    def reload(self) -> None:
        """Read the key file again; keep the current keys if it is broken or empty."""
        try:
            self._names = self._read()
        except ModelLoadError as error:
            logger.error("keeping the current API keys: %s", error)
            return
        logger.info("%d API keys loaded", len(self._names))

    def _digest(self, key: bytes) -> bytes:
        """Return a digest that nobody else can compute: how long looking it up takes says nothing of keys."""
        return hmac.digest(self._secret, key, "sha256")

    def _count(self, name: str) -> None:
        """Use one of a key's requests; they are replenished evenly over a minute."""
        limit = self._settings.requests_per_minute
        if not limit:
            return
        now = monotonic()
        left, then = self._buckets.get(name, (float(limit), now))
        left = min(left + (now - then) * limit / 60, float(limit))
        if left < 1:
            wait_s = -int(-(1 - left) * 60 / limit // 1)
            raise Overloaded(f"This API key may send {limit} requests a minute", retry_after_s=max(wait_s, 1))
        self._buckets[name] = left - 1, now

    def _read(self) -> dict[bytes, str]:
        keys = [("", key) for key in self._settings.api_key]
        if self._settings.api_key_file is not None:
            keys += read_key_file(self._settings.api_key_file)
        return {(digest := self._digest(key.encode())): name or self._number(digest) for name, key in keys}

    def _number(self, digest: bytes) -> str:
        return self._numbered.setdefault(digest, f"key {len(self._numbered) + 1}")


def read_key_file(path: str) -> list[tuple[str, str]]:
    """Return (name, key) of each line: `key` or `name key`; empty lines and # comments are skipped.

    Raises:
        ModelLoadError: if the file cannot be read or has no key, or a line has more than two words or what
            is not printable.
    """
    try:
        text = Path(path).read_text("utf-8-sig")  # Windows' editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"--api-key-file {path}: cannot be read: {error}") from None
    lines = [line.split() for line in text.splitlines() if not line.lstrip().startswith("#")]
    keys = []
    for words in filter(None, lines):
        if len(words) > 2:
            raise ModelLoadError(f"--api-key-file {path}: a line must be a key, or a name and a key")
        if not all(map(str.isprintable, words)):
            raise ModelLoadError(f"--api-key-file {path}: names and keys must be printable")
        keys.append((words[0] if len(words) == 2 else "", words[-1]))
    if not keys:
        raise ModelLoadError(f"--api-key-file {path}: contains no key")
    return keys


def _key_of(exchange: Exchange) -> bytes:
    given = exchange.header(b"authorization")
    scheme, _, key = (given or b"").strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    for name in _OTHER_HEADERS:  # also next to another scheme, which is then meant for a proxy
        if (own := exchange.header(name)) is not None:
            return own.strip()
    if given is None:
        raise Unauthorized("No API key was given; send it as `Authorization: Bearer <key>`")
    raise Unauthorized("The API key is wrong")


def _is_open(access: Access, exchange: Exchange) -> bool:
    if access is Access.BROWSER:
        return wants_html(exchange.header(b"accept"))
    return access is Access.OPEN
