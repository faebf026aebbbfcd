"""The listening socket and hypercorn's configuration: what long streams need."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from typing import Any

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve.connections import ConnectionLimit, Turnstile, _Connection
from tgi_asgi.serve.server import STALLED_READER_MS, listen, make_config
from tgi_asgi.settings import Settings

LOCAL = Settings(hostname="127.0.0.1", port=0)


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


def test_hypercorn_takes_over_the_socket_and_none_of_its_short_limits() -> None:
    listener = listen(LOCAL)
    address = listener.getsockname()
    config = make_config(listener)
    (bound,) = config.create_sockets().insecure_sockets
    with bound:
        assert bound.getsockname() == address
    assert config.backlog >= 1024
    assert config.keep_alive_timeout > 60
    assert config.keep_alive_max_requests > 1_000_000
    assert config.read_timeout is None
    assert "h2" not in config.alpn_protocols


async def test_connections_that_come_at_once_begin_a_few_a_turn_and_in_order() -> None:
    turnstile, passed = Turnstile(4), []

    async def begin(number: int) -> None:
        await turnstile.enter()
        passed.append(number)

    tasks = [asyncio.create_task(begin(number)) for number in range(30)]
    tasks[7].cancel()
    counts = []
    async with asyncio.timeout(5):
        while len(passed) < 29:
            before = len(passed)
            await asyncio.sleep(0)
            counts.append(len(passed) - before)
    assert max(counts) <= 4
    assert passed == [number for number in range(30) if number != 7]
    await turnstile.enter()  # nobody is left before it


class _GivenUp:
    """A writer whose connection the kernel has closed, as the reader had stalled."""

    def write_eof(self) -> None: ...

    def close(self) -> None: ...

    async def wait_closed(self) -> None:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


async def test_a_connection_that_the_kernel_gave_up_ends_without_a_traceback() -> None:
    unused: Any = None
    writer: Any = _GivenUp()
    connection = _Connection(
        ConnectionLimit(0), Turnstile(1), unused, unused, unused, unused, unused, unused, writer
    )
    await connection._close()
