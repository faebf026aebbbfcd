"""Connections: closed ones leave nothing behind, and each client has a limited number."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Sequence

import pytest

from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tests.support.server_process import NEW_INTERPRETER, ServerProcess
from tests.support.serving import connect, serving
from tests.support.waiting import LONGEST_S
from tgi_asgi.serve.process import MAX_FILES

REQUEST = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def _serve(*arguments: str, program: Sequence[str] = ()) -> ServerProcess:
    return ServerProcess("tests.server.fake_server", "--model-id", "fake", *arguments, program=program)


def _num_sockets(server: ServerProcess) -> int:
    folder = f"/proc/{server.process.pid}/fd"
    count = 0
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed since the folder was listed
            count += "socket" in os.readlink(f"{folder}/{name}")
    return count


def test_a_connection_that_the_client_closes_is_closed_at_once() -> None:
    """It must not wait for the keep-alive timeout, which is longer than this test waits."""
    with _serve() as server:
        server.wait_until_healthy()
        before = _num_sockets(server)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
                client.sendall(REQUEST)
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
        give_up_s = time.monotonic() + 20
        while _num_sockets(server) > before:
            assert time.monotonic() < give_up_s, "sockets of closed connections are still open"
            time.sleep(0.05)


def test_one_address_has_as_many_connections_as_it_may() -> None:
    with _serve("--max-connections-per-client", "3") as server:
        server.wait_until_healthy()
        clients = []
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            client.sendall(REQUEST)
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
            clients.append(client)
        refused = server.get("/health")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error_type"] == "overloaded"
        clients.pop().close()
        server.wait_until_healthy()
        for client in clients:
            client.close()


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["unfinished", "finished"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_a_head_that_is_too_large_is_refused(method: bytes, end: bytes) -> None:
    async def ask(head: bytes) -> tuple[bytes, bytes]:
        async with serving(scripted_app(ScriptedEngine())) as url, asyncio.timeout(LONGEST_S):
            reader, writer = await connect(url)
            writer.write(head)
            answer = await reader.read()
            writer.close()
        start, _, body = answer.partition(b"\r\n\r\n")
        return start.split(b"\r\n")[0], body

    start = method + b" /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: "
    status, body = asyncio.run(ask(start + b"a" * (80 << 10) + end))
    assert status == b"HTTP/1.1 431 "
    assert (method == b"HEAD" and bool(end)) or "too large" in json.loads(body)["error"]
    assert asyncio.run(ask(start + b"a" * (60 << 10) + b"\r\n\r\n")) == (b"HTTP/1.1 200 ", b"")


@pytest.mark.parametrize(
    "rest",
    [
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x80\0\0\0\0",
        b"\r\n",
        b"content-length: 5\r\n\r\nhello",
    ],
    ids=["a handshake", "a frame at once", "no key", "a body"],
)
async def test_a_websocket_is_refused_and_its_connection_closed(rest: bytes) -> None:
    request = b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    async with serving(scripted_app(ScriptedEngine())) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        writer.write(request + rest)
        answer = await reader.read()
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 426 ")  # after which Codex goes on by HTTP at once
    assert b"upgrade: HTTP/1.1" in head
    assert "no WebSockets" in json.loads(body)["error"]


def test_a_server_takes_more_file_descriptors_than_shells_give() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(256, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))  # the server inherits it
    try:
        server = _serve(program=NEW_INTERPRETER)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with server:
        server.wait_until_healthy()
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[0] == min(hard, MAX_FILES)
