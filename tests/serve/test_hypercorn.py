"""hypercorn's configuration: limits for long streams, native classes, HTTP/1 only."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import h11
import httpx
import hypercorn.protocol.h2
import pytest

from tests.serve.conftest import ListeningAddress
from tests.support.serving import LOCAL, REPLACED, connect, restored_hypercorn, serving
from tests.support.waiting import LONGEST_S
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve import hypercorn as module
from tgi_asgi.serve.body_chunks import Stream
from tgi_asgi.serve.connections import ConnectionLimit, Requests
from tgi_asgi.serve.hypercorn import install, make_config
from tgi_asgi.serve.listening import listen
from tgi_asgi.settings import Settings


def _classes() -> list[object]:
    return [getattr(holder, name) for holder, name in REPLACED]


def test_hypercorn_takes_over_the_socket_and_none_of_its_short_limits() -> None:
    listener = listen(LOCAL)
    address = listener.getsockname()
    config = make_config(listener, LOCAL)
    (bound,) = config.create_sockets().insecure_sockets
    with bound:
        assert bound.getsockname() == address
    assert config.backlog >= 1024
    assert config.keep_alive_timeout > 600  # Google's load balancers keep connections for that long
    assert config.keep_alive_max_requests > 1_000_000
    assert config.read_timeout is None
    assert "h2" not in config.alpn_protocols


def test_a_certificate_that_cannot_be_used_is_one_clear_line(tls: ListeningAddress, tmp_path: Path) -> None:
    chain, key = tls.settings.ssl_certfile, tls.settings.ssl_keyfile
    for certfile, keyfile in ((chain, chain), (key, key), (str(tmp_path / "none.pem"), key), (chain, None)):
        with pytest.raises(
            ModelLoadError, match=r"--ssl-certfile, --ssl-keyfile: cannot use .*pem"
        ) as caught:
            make_config(listen(LOCAL), Settings(ssl_certfile=certfile, ssl_keyfile=keyfile))
        assert "PEM lib" not in caught.value.message, "OpenSSL's own words say nothing to people"


def test_the_key_may_be_in_the_certificate_s_file(tls: ListeningAddress, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    paths = (tls.settings.ssl_certfile, tls.settings.ssl_keyfile)
    both.write_text("".join(Path(path or "").read_text() for path in paths))
    config = make_config(listen(LOCAL), Settings(ssl_certfile=str(both)))
    assert config.create_ssl_context() is not None
    config.create_sockets().secure_sockets[0].close()


def test_our_classes_take_the_place_of_hypercorn_s_for_http_1() -> None:
    own, http_2 = _classes(), vars(hypercorn.protocol.h2)
    own_2 = http_2["HTTPStream"]
    with restored_hypercorn():
        install(ConnectionLimit(0))
        assert not any(ours is theirs for ours, theirs in zip(_classes(), own, strict=True))
        assert _classes()[-1] is Stream
        assert http_2["HTTPStream"] is own_2
    assert _classes() == own


def test_an_unknown_hypercorn_is_refused() -> None:
    own = _classes()
    with restored_hypercorn() as patch:
        patch.setattr(module, "version", lambda name: "0.19.0")
        with pytest.raises(ModelLoadError, match=r"needs hypercorn 0\.18\.\*, and 0\.19\.0"):
            install(ConnectionLimit(0))
        assert _classes() == own


async def version_of(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the HTTP version of the request."""
    body = scope["http_version"].encode()
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    "preface", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/2.0\r\nhost: x\r\n\r\n"]
)
async def test_http_2_by_prior_knowledge_is_refused(preface: bytes) -> None:
    async with serving(version_of) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        writer.write(preface + b"\0\0\0\4\0\0\0\0\0")  # followed by the first frame
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 505 ")
        assert json.loads(body) == {
            "error": "This server speaks HTTP/1.0 and HTTP/1.1", "error_type": "validation"
        }  # fmt: skip
        writer.close()


async def test_a_body_with_two_lengths_is_refused() -> None:
    async with serving(version_of) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + b"0\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1
        writer.close()


@pytest.mark.parametrize("lines", [b"\r\n", b"\n", b"\r\n\r\n", b"\r\n" * 40_000])
async def test_empty_lines_before_a_request_are_ignored(lines: bytes) -> None:
    """RFC 9112, section 2.2; old clients send one after a body."""
    async with serving(version_of) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        writer.write(lines)
        for _ in range(3):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}" + lines)
            answer = await reader.readuntil(b"\r\n\r\n1.1")
            assert answer.startswith(b"HTTP/1.1 200 ")
        writer.write(b"\rGET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()


def test_an_empty_line_may_come_in_two_parts() -> None:
    requests = Requests(h11.SERVER)
    for part in (b"\r", b"\n", b"\r\n\r"):
        requests.receive_data(part)
        assert requests.next_event() is h11.NEED_DATA
    requests.receive_data(b"\nGET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert isinstance(requests.next_event(), h11.Request)


async def test_a_wish_to_upgrade_to_http_2_is_ignored() -> None:
    async with serving(version_of) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        request = (
            b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
            b"http2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n"
        )
        for _ in range(2):
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n1.1")
            assert answer.startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_client_of_http_2_is_refused_or_speaks_http_1(tls: ListeningAddress) -> None:
    async with serving(version_of) as url, httpx.AsyncClient(http1=False, http2=True) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(url)
    context = tls.tls or ssl.create_default_context()
    async with (
        serving(version_of, "native", tls.settings) as url,
        httpx.AsyncClient(http1=True, http2=True, verify=context) as client,
    ):
        answer = await client.get(url)
        assert (answer.http_version, answer.text) == ("HTTP/1.1", "1.1")
