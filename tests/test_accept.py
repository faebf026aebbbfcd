"""Accepting a few connections a turn, on both event loops."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from tgi_asgi.serve.accept import Acceptor, new_event_loop

NUM_CLIENTS = 40


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=NUM_CLIENTS) as made:
        yield made


def connect(listener: socket.socket, count: int) -> list[socket.socket]:
    return [socket.create_connection(listener.getsockname(), timeout=20) for _ in range(count)]


def test_connections_that_come_at_once_are_accepted_a_few_a_turn(listener: socket.socket) -> None:
    counts: list[int] = []
    writers: list[asyncio.StreamWriter] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(b"hello")

    async def serve() -> None:
        clients = connect(listener, NUM_CLIENTS)
        server = await asyncio.start_server(greet, sock=listener)
        assert isinstance(server, Acceptor)
        async with asyncio.timeout(20):
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
    """They are served as soon as there is one again, and meanwhile nothing spins."""
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
        monkeypatch.setattr("tgi_asgi.serve.accept._PAUSE_S", 0.01)
        full = Full(fileno=listener.detach())
        with connect(full, 1)[0] as client:
            server = await asyncio.start_server(greet, sock=full)
            assert await asyncio.to_thread(client.recv, 9) == b"hello"
        server.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())
    assert num_refused == 3
    assert caplog.text.count("connections wait: Too many open files") == 1
