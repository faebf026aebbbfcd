"""Servers that several tests share, and what the machine must have for a test to run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.support.server_process import ServerProcess


@pytest.fixture(scope="session")
def demo() -> Iterator[ServerProcess]:
    """Return a server of the demonstration model, started as `make serve` starts it."""
    with ServerProcess("tgi_asgi", "--hostname", "127.0.0.1") as server:
        server.wait_until_healthy()
        yield server


def require_program(name: str) -> str:
    """Return a program's path; without it the test is skipped, but under CI it fails."""
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} must be there under CI")
        pytest.skip(f"{name} is not installed")
    return path
