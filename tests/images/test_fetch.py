"""Fetching only from public addresses, whatever names, redirects and servers do, and only what fits."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any

import pytest
import trustme

from tests.support.pictures import Answer, answer, endless, web
from tests.support.waiting import LONGEST_S
from tgi_asgi.errors import ImageTooLarge, InvalidRequest
from tgi_asgi.images.addresses import is_public
from tgi_asgi.images.fetch import MAX_REDIRECTS, Fetcher

PUBLIC = "1.2.3.4"  # the default address of names; it leads to the tests' server
LIMIT = 100_000


class DownloadBudget:
    """A budget of `LIMIT` bytes."""

    def __init__(self) -> None:
        self.held = 0

    def expect(self, size: int) -> None:
        if self.held + size > LIMIT:
            raise ImageTooLarge("too large", param="here")

    def consume(self, size: int) -> None:
        self.expect(size)
        self.held += size


class Internet:
    """A fetcher for which `PUBLIC` is this machine and the test defines the names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, Sequence[str]] = {}
        self.lookups: list[str] = []
        self.connects: list[str] = []
        self.authority = trustme.CA()
        self.budget = DownloadBudget()
        real = asyncio.open_connection

        async def connect(host: str, port: int, **options: Any) -> Any:
            self.connects.append(host)
            assert is_public(host), "a connection to a non-public address"
            return await real("127.0.0.1", port, **options)

        monkeypatch.setattr(asyncio, "open_connection", connect)

    async def lookup(self, name: str, port: int) -> Sequence[str]:
        self.lookups.append(name)
        return self.names.get(name, [PUBLIC])

    async def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def server_tls(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names).configure_cert(context)
        return context

    async def fetch(self, url: str, *allowed: str) -> bytes:
        fetcher = Fetcher(frozenset(allowed), self.lookup, self.tls)
        async with asyncio.timeout(LONGEST_S):
            return await fetcher.fetch(url, "here", self.budget)

    async def refusal(self, url: str, *allowed: str) -> str:
        with pytest.raises(InvalidRequest) as caught:
            await self.fetch(url, *allowed)
        assert caught.value.param == "here"
        return caught.value.message


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Internet:
    return Internet(monkeypatch)


async def test_a_body_is_fetched_from_the_address_that_was_checked(internet: Internet) -> None:
    async with web({"/a%20b?c=%C3%A9": answer(b"data")}) as (port, heads):
        assert await internet.fetch(f"http://Example.COM.:{port}/a b?c=é#fragment") == b"data"
    assert internet.lookups == ["example.com"] and internet.connects == [PUBLIC]
    head = heads[0].decode().lower()
    assert f"host: example.com:{port}\r\n" in head and "accept-encoding: identity\r\n" in head
    assert "cookie" not in head and "authorization" not in head


async def chunked(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")


async def until_the_end(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.0 200 OK\r\n\r\nabc")
    await writer.drain()
    writer.write(b"defg")


@pytest.mark.parametrize("sent", [answer(b"abcdefg"), chunked, until_the_end])
async def test_bodies_end_in_each_of_http_s_ways(internet: Internet, sent: Answer) -> None:
    async with web({"/": sent}) as (port, _):
        assert await internet.fetch(f"http://a.example:{port}") == b"abcdefg"
    assert internet.budget.held == 7


async def test_certificates_are_checked_for_the_url_s_name(internet: Internet) -> None:
    async with web({"/": answer(b"data")}, internet.server_tls("good.example")) as (port, _):
        assert await internet.fetch(f"https://good.example:{port}/") == b"data"
        assert "no whole answer" in await internet.refusal(f"https://bad.example:{port}/")
        internet.authority = trustme.CA()
        assert "no whole answer" in await internet.refusal(f"https://good.example:{port}/")


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "169.254.169.254",
    "100.64.0.1",
    "::1",
    "::ffff:169.254.169.254",
    "fe80::1",
]


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("mixed", [False, True])
async def test_names_of_private_addresses_are_refused(internet: Internet, address: str, mixed: bool) -> None:
    internet.names["evil.example"] = [PUBLIC, address] if mixed else [address]
    assert "not public" in await internet.refusal("http://evil.example/")
    assert internet.connects == []


async def test_each_redirect_is_looked_up_and_checked(internet: Internet) -> None:
    internet.names["inside.example"] = ["10.0.0.1"]
    answers: dict[str, Answer] = {
        "/relative": answer(b"", "302 Found", location="/end"),
        "/inside": answer(b"", "301 Moved", location="http://inside.example/"),
        "/literal": answer(b"", "307 Moved", location="http://169.254.169.254/latest/meta-data/"),
        "/file": answer(b"", "302 Found", location="file:///etc/passwd"),
        "/odd": answer(b"", "302 Found", location="http://[x/"),
        "/nowhere": answer(b"", "302 Found"),
        "/loop": answer(b"", "302 Found", location="/loop"),
        "/end": answer(b"data"),
    }
    internet.names["169.254.169.254"] = ["169.254.169.254"]
    async with web(answers) as (port, heads):
        base = f"http://a.example:{port}"
        assert await internet.fetch(f"{base}/relative") == b"data"
        assert "not public" in await internet.refusal(f"{base}/inside")
        assert "not public" in await internet.refusal(f"{base}/literal")
        assert "must begin with" in await internet.refusal(f"{base}/file")
        assert "invalid" in await internet.refusal(f"{base}/odd")
        assert "status 302" in await internet.refusal(f"{base}/nowhere")
        heads.clear()
        assert "redirects more than" in await internet.refusal(f"{base}/loop")
        assert len(heads) == MAX_REDIRECTS + 1
    assert set(internet.connects) == {PUBLIC}


async def test_a_name_that_changes_its_address_between_check_and_connection_cannot(
    internet: Internet,
) -> None:
    """Check that the connection uses the verified address, without a second look-up that could differ."""
    addresses = iter([[PUBLIC], ["127.0.0.1"]])
    internet.lookup = lambda name, port: asyncio.sleep(0, next(addresses))  # type: ignore[method-assign]
    async with web({"/": answer(b"data")}) as (port, _):
        assert await internet.fetch(f"http://rebinding.example:{port}/") == b"data"
    assert internet.connects == [PUBLIC]
    assert next(addresses) == ["127.0.0.1"]


async def test_only_hosts_that_are_listed_are_fetched_from(internet: Internet) -> None:
    answers: dict[str, Answer] = {
        "/": answer(b"data"),
        "/away": answer(b"", "302 Found", location="http://b.example/"),
    }
    async with web(answers) as (port, _):
        assert await internet.fetch(f"http://A.example:{port}/", "a.example") == b"data"
        for url in (
            f"http://b.example:{port}/",
            f"http://x.a.example:{port}/",
            f"http://a.example:{port}/away",
        ):
            assert "does not fetch images from the host" in await internet.refusal(url, "a.example")


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("", "must begin with"), ("a.png", "must begin with"), ("//a.example/", "must begin with"),
        ("ftp://a.example/", "must begin with"), ("file:///etc/passwd", "must begin with"),
        ("gopher://a.example/", "must begin with"), ("http:///a", "must have a host"),
        ("http://user@a.example/", "must have a host"), ("http://u:p@a.example/", "must have a host"),
        ("http://a.example:0/", "must have a host"), ("http://a.example:99999/", "invalid"),
        ("http://a.example:x/", "invalid"), ("http://[::1/", "invalid"), ("http://[zz]/", "invalid"),
        ("http://\u2100.example/", "invalid"), (f"http://é{'a' * 80}.example/", "invalid"),
        ("http://a.example/" + "a" * 9000, "characters"),
    ],
)  # fmt: skip
async def test_odd_urls_are_refused_before_anything_is_looked_up(
    internet: Internet, url: str, word: str
) -> None:
    assert word in await internet.refusal(url)
    assert internet.lookups == []


async def no_name(name: str, port: int) -> Sequence[str]:
    raise OSError("no such name")


async def no_address(name: str, port: int) -> Sequence[str]:
    return []


@pytest.mark.parametrize("lookup", [no_name, no_address])
async def test_unknown_names_are_refused(internet: Internet, lookup: Any) -> None:
    internet.lookup = lookup  # type: ignore[method-assign]
    assert "no whole answer" in await internet.refusal("http://a.example/")


async def test_a_refused_connection_is_told_as_any_other_failure(internet: Internet) -> None:
    async with web({}) as (port, _):
        pass
    assert "no whole answer" in await internet.refusal(f"http://a.example:{port}/")


@pytest.mark.parametrize(
    "sent", [endless, answer(b"x", content_length=10**12), answer(b"x", content_length=LIMIT + 1)]
)
async def test_bytes_are_counted_as_they_arrive(internet: Internet, sent: Answer) -> None:
    async with web({"/": sent}) as (port, _):
        with pytest.raises(ImageTooLarge):
            await internet.fetch(f"http://a.example:{port}/")
    assert internet.budget.held <= LIMIT


async def endless_head(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"a: " + b"b" * 1000 + b"\r\n")
        await writer.drain()


async def crumbs(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(20):
        writer.write(b"1\r\nX\r\n" * 1000)
        await writer.drain()
    writer.write(b"0\r\n\r\n")


async def test_an_answer_in_very_small_parts_is_refused(internet: Internet) -> None:
    async with web({"/": crumbs}) as (port, _):
        assert "too many parts" in await internet.refusal(f"http://a.example:{port}/")


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"hello\r\n\r\n", b"\xff\xfe\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/2 200\r\n\r\n",
        endless_head,
        answer(b"short", content_length=99), answer(b"x", content_length="9" * 5000),
        answer(b"x", "200 OK", content_length="", transfer_encoding="gzip"),
        answer(b"x", "404 Not Found"), answer(b"", "204 No Content"), answer(b"x", "206 Partial Content"),
        answer(b"x", "500 Oh"), answer(b"x", content_encoding="gzip"), answer(b"", "304 Not Modified"),
        answer(b"x", content_length="-1"), answer(b"x", "101 Switching Protocols"),
    ],
)  # fmt: skip
async def test_what_is_no_whole_answer_is_refused(internet: Internet, sent: Answer) -> None:
    async with web({"/": sent}) as (port, _):
        await internet.refusal(f"http://a.example:{port}/")


async def test_a_slow_server_is_left_when_the_time_is_over(internet: Internet) -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def slow(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\na: ")
        came.set()
        try:
            while True:
                writer.write(b"b")
                await writer.drain()
                await asyncio.sleep(0.01)
        finally:
            left.set()

    async with web({"/": slow}) as (port, _):
        fetch = asyncio.create_task(internet.fetch(f"http://a.example:{port}/"))
        await came.wait()
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        async with asyncio.timeout(LONGEST_S):
            await left.wait()
