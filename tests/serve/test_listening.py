"""Listening sockets, and accepting a few connections per turn of the event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import stat
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import ListeningAddress
from tests.support.serving import LOCAL, connect, serving
from tests.support.waiting import LONGEST_S, until
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve import connections
from tgi_asgi.serve.connections import ConnectionLimit
from tgi_asgi.serve.listening import STALLED_READER_MS, Acceptor, listen, new_event_loop
from tgi_asgi.settings import Settings

NUM_CLIENTS = 40


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=NUM_CLIENTS) as made:
        yield made


def clients_of(listener: socket.socket, count: int) -> list[socket.socket]:
    return [socket.create_connection(listener.getsockname(), timeout=20) for _ in range(count)]


def test_connections_that_come_at_once_are_accepted_a_few_a_turn(listener: socket.socket) -> None:
    counts: list[int] = []
    writers: list[asyncio.StreamWriter] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(b"hello")

    async def serve() -> None:
        clients = clients_of(listener, NUM_CLIENTS)
        server = await asyncio.start_server(greet, sock=listener)
        assert isinstance(server, Acceptor)
        async with asyncio.timeout(LONGEST_S):
            while len(writers) < NUM_CLIENTS:
                before = len(writers)
                await asyncio.sleep(0)
                counts.append(len(writers) - before)
        for client in clients:
            assert await asyncio.to_thread(client.recv, 9) == b"hello"
            client.close()
        server.close()
        server.close()
        await server.wait_closed()
        for writer in writers:
            writer.close()
        assert listener.fileno() < 0

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())
    assert max(counts) <= 8


def test_connections_wait_while_there_is_no_descriptor_for_them(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are served as soon as a descriptor is free, without busy waiting until then."""
    num_refused = 0

    class Full(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal num_refused
            if num_refused < 3:
                num_refused += 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async def serve() -> None:
        monkeypatch.setattr("tgi_asgi.serve.listening._PAUSE_S", 0.01)
        full = Full(fileno=listener.detach())
        with clients_of(full, 1)[0] as client:
            server = await asyncio.start_server(greet, sock=full)
            assert await asyncio.to_thread(client.recv, 9) == b"hello"
        server.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())
    assert num_refused == 3
    assert caplog.text.count("connections wait: Too many open files") == 1


def test_connections_leave_descriptors_for_files(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys, adapters and modules are read while clients hold all connections that there may be."""
    writers: list[asyncio.StreamWriter] = []
    counts: list[int] = []
    reserved = 5

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(b"hello")

    async def serve() -> None:
        monkeypatch.setattr("tgi_asgi.serve.listening._PAUSE_S", 0.01)
        clients = clients_of(listener, NUM_CLIENTS)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        limits = (lowest_free + 10 + reserved, 65536)
        monkeypatch.setattr("tgi_asgi.serve.listening._NUM_RESERVED", reserved)
        monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
        server = await asyncio.start_server(greet, sock=listener)
        await until(lambda: len(writers) >= 5)
        await asyncio.sleep(0.05)
        counts.append(len(writers))
        async with asyncio.timeout(LONGEST_S):
            while len(writers) < NUM_CLIENTS:
                for writer in writers:
                    writer.close()
                await asyncio.sleep(0.01)
        for client in clients:
            assert await asyncio.to_thread(client.recv, 9) == b"hello"
            client.close()
        server.close()
        for writer in writers:
            writer.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())
    assert counts[0] <= 10
    assert caplog.text.count("connections wait: Too many open files") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hand these options on")
def test_accepted_connections_end_for_readers_that_stall_or_vanish() -> None:
    with listen(LOCAL) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            timeout_ms = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert timeout_ms == STALLED_READER_MS
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_connections_queue_before_anybody_accepts() -> None:
    with listen(LOCAL) as listener, socket.create_connection(listener.getsockname(), timeout=5) as early:
        assert early.getpeername() == listener.getsockname()


def test_a_port_that_is_taken_names_the_flag() -> None:
    with listen(LOCAL) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ModelLoadError, match=f"port {port}: Address already in use.*--port"):
            listen(Settings(hostname="127.0.0.1", port=port))


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0")]
)
def test_names_of_this_machine_are_resolved(host: str, address: str) -> None:
    with listen(Settings(hostname=host, port=0)) as listener:
        assert listener.getsockname()[0] == address


@pytest.mark.parametrize("host", ["3f2a9c.invalid", "192.0.2.1", "a..b"])
def test_what_is_no_address_of_this_machine_is_refused_and_never_means_all(host: str) -> None:
    with pytest.raises(ModelLoadError, match=f"{host}.*"):
        listen(Settings(hostname=host, port=0))


def test_a_socket_that_a_dead_server_has_left_is_taken_over(tmp_path: Path) -> None:
    settings = Settings(uds=str(tmp_path / "socket"))
    listen(settings).close()  # leaves the socket's file
    with listen(settings) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())


def test_a_socket_that_somebody_listens_on_is_left_to_them(tmp_path: Path) -> None:
    settings = Settings(uds=str(tmp_path / "socket"))
    with listen(settings) as listener:
        with pytest.raises(ModelLoadError, match=r"socket: Address already in use.*--uds"):
            listen(settings)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(listener.getsockname())


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(ModelLoadError, match="--uds"):
        listen(Settings(uds=str(file)))
    assert file.read_text() == "kept"


def test_a_path_that_is_too_long_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"path too long.*--uds"):
        listen(Settings(uds=str(tmp_path / ("a" * 200))))
    # Up to Python 3.13, the file system refuses this one first.
    with pytest.raises(ModelLoadError, match=r"(name|path) too long.*--uds"):
        listen(Settings(uds=str(tmp_path / ("a" * 300))))


def test_the_umask_decides_who_may_connect(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        with listen(Settings(uds=str(tmp_path / "socket"))):
            assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == 0o770
    finally:
        os.umask(before)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": scope["scheme"][:5].encode()})


async def test_what_speaks_no_tls_is_cut_off_and_the_next_one_is_served(
    tls: ListeningAddress, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(hello, "native", tls.settings) as url, asyncio.timeout(LONGEST_S):
        reader, writer = await connect(url)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert not (await reader.read()).startswith(b"HTTP")  # at most a TLS alert
        writer.close()
        reader, writer = await connect(url, tls.tls)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\nhttps")).startswith(b"HTTP/1.1 200")
        writer.close()
    assert not caplog.records


async def test_a_client_that_never_ends_its_handshake_is_cut_off(
    tls: ListeningAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_S", 0.05)
    async with serving(hello, "native", tls.settings) as url, asyncio.timeout(LONGEST_S / 2):
        reader, writer = await connect(url)
        writer.write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
        assert await reader.read() == b""
        writer.close()


def test_handshakes_count_as_connections_of_their_address(
    tls: ListeningAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beyond the limit end soon. A client that greets at once is told why, or served."""
    monkeypatch.setattr(connections, "HANDSHAKE_S", 10 * LONGEST_S)
    monkeypatch.setattr(connections, "REFUSED_HANDSHAKE_S", 1.0)
    limit = ConnectionLimit(2)

    async def answer_of(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bytes:
        streams[1].write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        return await streams[0].readuntil(b"\r\n\r\n")

    async def serve() -> None:
        async with serving(hello, "native", tls.settings, limit=limit) as url, asyncio.timeout(LONGEST_S):
            silent = [await connect(url) for _ in range(6)]
            ends = [asyncio.create_task(reader.read()) for reader, _ in silent]
            await until(lambda: sum(end.done() for end in ends) == 4)
            others = [await connect(url, tls.tls) for _ in range(3)]
            answers = [await answer_of(other) for other in others]
            assert [answer[9:12] for answer in answers] == [b"200", b"200", b"429"]
            for _, writer in silent + others:
                writer.close()
            await asyncio.gather(*ends)

    with asyncio.Runner(loop_factory=partial(new_event_loop, limit)) as runner:
        runner.run(serve())
