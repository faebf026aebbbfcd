"""Notifications to systemd: the model is loaded, the progress until then, and that the server is stopping."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess
from tgi_asgi.serve.notify import notify


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """Yield a socket that stands in for systemd's, and its path."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(60)
        yield listener, path


def test_a_server_tells_when_it_is_ready_and_leaves(manager: tuple[socket.socket, str]) -> None:
    listener, path = manager
    environ = {"NOTIFY_SOCKET": path}
    with ServerProcess("tests.server.fake_server", "--model-id", "fake", environ=environ) as server:
        assert listener.recv(4096) == b"STATUS=reading weights"
        ready, status = listener.recv(4096).decode().split("\n")
        assert ready == "READY=1"
        assert status.startswith("STATUS=serving ") and str(server.port) in status
        server.wait_until_healthy()
        server.signal()
        assert listener.recv(4096).startswith(b"STOPPING=1\n")
        assert server.wait() == 0


def test_names_of_the_abstract_namespace_are_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = f"tgi-asgi-test-{tmp_path.name}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(60)
        notify("READY=1", "STATUS=ok")
        assert listener.recv(4096) == b"READY=1\nSTATUS=ok"


@pytest.mark.parametrize("path", [None, "", "/there/is/none"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", path)
    notify("READY=1")
