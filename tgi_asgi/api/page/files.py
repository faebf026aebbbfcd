"""The files of the web pages, served from memory, and the choice of clients that get the chat at `/`.

The files contain no secrets and need no key: the pages fetch their data like any client, with the user's key.
`static/` is plain JavaScript and CSS, served unchanged.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tgi_asgi.api.exchange import Exchange, Handler
from tgi_asgi.errors import NotFound

FOLDER = Path(__file__).parent / "static"
TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
# Only own files and own requests; images only from the page itself. Text cannot become HTML: browsers that
# support trusted types block every way of doing that.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = (
    (b"cache-control", b"no-cache"),  # cached but revalidated, so an upgrade shows on the next visit
    (b"content-security-policy", POLICY.encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file's bytes and headers."""

    body: bytes
    content_type: bytes
    etag: bytes

    @classmethod
    def read(cls, path: Path) -> StaticFile:
        """Read a file of one of the pages' types."""
        body = path.read_bytes()
        return cls(body, TYPES[path.suffix], b'"%b"' % hashlib.sha256(body).hexdigest()[:32].encode())

    async def answer(self, exchange: Exchange) -> None:
        """Answer with the file, or with 304 if the client already has this version."""
        status = 304 if _has(exchange.header(b"if-none-match"), self.etag) else 200
        await exchange.respond(status, self.body, self.content_type, [(b"etag", self.etag), *_HEADERS])


@functools.cache
def _read_files() -> Mapping[str, StaticFile]:
    return {path.name: StaticFile.read(path) for path in FOLDER.iterdir() if path.suffix in TYPES}


class Pages:
    """All files of the pages, read once in a process, at server start."""

    def __init__(self) -> None:
        self._files = _read_files()

    async def file(self, exchange: Exchange) -> None:
        """Answer with the file that the path names.

        Raises:
            NotFound: if there is none.
        """
        name = exchange.scope["path_params"]["name"]
        if name not in self._files:
            raise NotFound(f"No route {exchange.method} {exchange.path}")
        await self._files[name].answer(exchange)

    async def docs(self, exchange: Exchange) -> None:
        """Answer with the page of the API's description; its links are relative to `/docs`, not `/docs/`."""
        if exchange.scope.get("raw_path", b"").endswith(b"/"):
            await exchange.respond(308, b"", headers=[(b"location", b"../docs")])
            return
        exchange.response_headers.append((b"vary", b"accept"))  # `ApiKeys` lets browsers in without a key
        await self._files["docs.html"].answer(exchange)

    def chat_or(self, other: Handler) -> Handler:
        """Return a handler that shows the chat to clients that ask for HTML; `other` answers the rest."""

        async def handle(exchange: Exchange) -> None:
            exchange.response_headers.append((b"vary", b"accept"))
            if wants_html(exchange.header(b"accept")):
                await self._files["index.html"].answer(exchange)
            else:
                await other(exchange)

        return handle


def wants_html(accept: bytes | None) -> bool:
    """Return whether an `Accept` header names text/html, as browsers' do; probes' `*/*` does not count."""
    for each in (accept or b"").lower().split(b","):
        kind, *parameters = [part.strip() for part in each.split(b";")]
        if kind == b"text/html":
            weight = next((part[2:] for part in parameters if part.startswith(b"q=")), b"1")
            return weight.strip(b"0.") != b""
    return False


def _has(if_none_match: bytes | None, etag: bytes) -> bool:
    """Compare weakly, because proxies that compress mark the tags of what they forward as `W/`."""
    tags = [tag.strip().removeprefix(b"W/") for tag in (if_none_match or b"").split(b",")]
    return etag in tags or b"*" in tags
