"""Fetch images over http(s) from public addresses, for clients that may name any URL.

    fetcher = Fetcher(frozenset(), lookup, tls)
    data = await fetcher.fetch("https://example.com/a.png", "messages[0].content[1].image_url", budget)

A host name is resolved once. Its addresses are checked, and the connection is made to one of them, with the
URL's name for TLS. HTTP client libraries would resolve the name again after the check, so this uses h11,
which only parses.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol
from urllib.parse import quote, urljoin, urlsplit

import h11

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.images.addresses import is_public

MAX_REDIRECTS = 5
MAX_URL_CHARS = 8192
_MAX_ADDRESSES = 4  # of a host name, tried in turn
_CONNECT_TIMEOUT_S = 3.0  # per address
_MAX_HEADER_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_TURN = 64  # parts of an answer, of 10 µs each, after which other tasks get their turn
MAX_SMALL_PARTS = 2048  # parts beyond one for each 64 bytes; no server sends an image in such
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_PATH_SAFE = "%/:=&?~#+!$,;'@()*[]"  # characters allowed unquoted in a path or a query

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]  # returns a host name's addresses; raises OSError
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class DownloadBudget(Protocol):
    """A budget of bytes to read, shared by all images of a request; raises when it is exceeded."""

    def expect(self, size: int) -> None:
        """Check the announced size of a response against the budget."""

    def consume(self, size: int) -> None:
        """Count bytes before they are kept."""


@dataclass(frozen=True, slots=True)
class _Target:
    """The parts of a URL."""

    url: str
    is_tls: bool
    host: str  # in ASCII
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.is_tls else "http"] else f"{host}:{self.port}"


class Fetcher:
    """A client that fetches from public servers, or only from an administrator's list of hosts.

    Args:
        allowed_hosts: Lower-case host names; empty: any host.
        lookup: Resolves a host name to its addresses.
        tls: Makes the context for checking certificates; called once.
        is_allowed: Returns whether an address may be connected to.
    """

    def __init__(
        self,
        allowed_hosts: frozenset[str],
        lookup: Lookup,
        tls: Callable[[], Awaitable[ssl.SSLContext]],
        *,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._allowed_hosts = allowed_hosts
        self._lookup = lookup
        self._make_tls = tls
        self._tls: ssl.SSLContext | None = None
        self._is_allowed = is_allowed

    async def fetch(self, url: str, param: str, budget: DownloadBudget) -> bytes:
        """Return the body of the response to a GET of the URL. The caller limits the time.

        Raises:
            InvalidRequest: if the URL may not be fetched, or yields no image data.
        """
        for _ in range(MAX_REDIRECTS + 1):
            target = self._target(url, param)
            answer = await self._get(target, param, budget)
            if isinstance(answer, bytes):
                return answer
            try:
                url = urljoin(target.url, answer.location)
            except ValueError:
                _refuse(param, "its URL redirects to one that is invalid")
        _refuse(param, f"its URL redirects more than {MAX_REDIRECTS} times")

    def allows_host_of(self, url: str) -> bool:
        """Return whether a URL's host is on the administrator's list."""
        try:
            return bool(self._allowed_hosts) and bool(self._target(url, ""))
        except InvalidRequest:
            return False

    def _target(self, url: str, param: str) -> _Target:
        """Parse a URL, and check everything that can be checked without resolving it."""
        if len(url) > MAX_URL_CHARS:
            _refuse(param, f"its URL has more than {MAX_URL_CHARS} characters")
        try:
            parts = urlsplit(url.strip())
            host, port = _ascii(parts.hostname or ""), parts.port
            path = quote(parts.path or "/", _PATH_SAFE) + (
                f"?{quote(parts.query, _PATH_SAFE)}" if parts.query else ""
            )
        except ValueError:
            _refuse(param, "its URL is invalid")
        if parts.scheme not in _PORTS:
            _refuse(param, "its URL must begin with https:, http: or data:")
        if not host or port == 0 or parts.username is not None or parts.password is not None:
            _refuse(param, "its URL must have a host, and neither a name nor a password")
        if self._allowed_hosts and host not in self._allowed_hosts:
            _refuse(param, f"this server does not fetch images from the host {host[:100]!r}")
        return _Target(url, parts.scheme == "https", host, port or _PORTS[parts.scheme], path)

    async def _get(self, target: _Target, param: str, budget: DownloadBudget) -> bytes | _Redirect:
        try:
            async with self._connected(target, param) as (reader, writer):
                http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
                headers = [
                    ("host", target.authority),
                    ("user-agent", "tgi-asgi"),
                    ("accept", "image/*"),
                    ("accept-encoding", "identity"),
                    ("connection", "close"),
                ]
                request = h11.Request(method="GET", target=target.path, headers=headers)
                writer.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
                return await _read(http, reader, param, budget)
        except (OSError, h11.ProtocolError, ValueError):  # their messages may reveal the server's network
            _refuse(param, "its URL gives no whole answer")

    @asynccontextmanager
    async def _connected(self, target: _Target, param: str) -> AsyncIterator[Connection]:
        """Connect to an address of the target after checking all of them."""
        addresses = await self._lookup(target.host, target.port)
        if not all(map(self._is_allowed, addresses)):  # one of several may be in the server's network
            _refuse(param, "its URL leads to an address that is not public")
        context = await self._context() if target.is_tls else None
        writer = None
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(
                        address,
                        target.port,
                        ssl=context,
                        server_hostname=target.host if target.is_tls else None,
                    )
                break
            except OSError:  # includes TimeoutError
                continue
        if writer is None:
            raise OSError("no address answers")
        try:
            yield reader, writer
        finally:
            writer.transport.abort()  # no orderly shutdown is needed

    async def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await self._make_tls()
        return self._tls


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


async def _read(
    http: h11.Connection, reader: asyncio.StreamReader, param: str, budget: DownloadBudget
) -> bytes | _Redirect:
    """Read a response: return its body, or the redirect."""
    parts: list[bytes] = []
    num_events = num_bytes = 0
    while True:
        num_events += 1
        if num_events % _TURN == 0:
            await asyncio.sleep(0)
        if num_events - num_bytes // 64 > MAX_SMALL_PARTS:
            _refuse(param, "its URL was answered in too many parts")
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            if (redirect := _read_head(event, param, budget)) is not None:
                return redirect
        elif isinstance(event, h11.Data):
            budget.consume(len(event.data))
            parts.append(bytes(event.data))
            num_bytes += len(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return b"".join(parts)
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise OSError("the connection was closed")


def _read_head(response: h11.Response, param: str, budget: DownloadBudget) -> _Redirect | None:
    """Return the redirect that a response is, if it is one; refuse what is no image's beginning."""
    headers = dict(response.headers)
    if response.status_code in _REDIRECTS and b"location" in headers:
        return _Redirect(headers[b"location"].decode("latin-1"))
    if response.status_code != 200:
        _refuse(param, f"its URL was answered with status {response.status_code}")
    if headers.get(b"content-encoding", b"identity") not in (b"", b"identity"):
        _refuse(param, "its URL was answered with compressed data")
    length = headers.get(b"content-length", b"")
    if length.isdigit():
        budget.expect(int(length))
    return None


def _ascii(host: str) -> str:
    """Return a host name in the form that DNS uses."""
    host = host.rstrip(".").lower()
    return host if host.isascii() else host.encode("idna").decode("ascii")


def _refuse(param: str, why: str) -> NoReturn:
    raise InvalidRequest(f"`{param}` could not be fetched: {why}", param=param, code="invalid_image_url")
