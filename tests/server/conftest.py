"""Servers that several tests share, and the checks for programs that tests need."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.support.server_process import NEW_INTERPRETER, ServerProcess

_NODE = Path(__file__).parent / "node"


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    """Collect garbage after each module, so that its open sockets are reported for that module."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def demo(demo_gguf: Path) -> Iterator[ServerProcess]:
    """Yield a server of the demonstration model, started as `make serve` starts it."""
    with ServerProcess("tgi_asgi", "--hostname", "127.0.0.1", program=NEW_INTERPRETER) as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture
def client(demo: ServerProcess) -> Iterator[OpenAI]:
    """Yield OpenAI's client of that server, closed after the test."""
    with OpenAI(base_url=demo.url + "/v1", api_key="-", max_retries=0) as client:
        yield client


def require_program(name: str) -> str:
    """Return a program's path; skip the test if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def require_node() -> str:
    """Return Node's path; skip the test without Node and OpenAI's SDK for it, but fail under CI."""
    node = require_program("node")
    if not (_NODE / "node_modules").is_dir():
        pytest.skip("the SDK for Node is not installed: `make test` does it")
    return node


def run_node(script: str, base_url: str, **variables: str) -> Any:
    """Run a script of OpenAI's SDK for Node against a server; return the JSON that it prints."""
    node = require_node()
    environ = {**os.environ, "BASE_URL": base_url, **variables}
    run = subprocess.run(
        [node, script], cwd=_NODE, env=environ, capture_output=True, text=True, timeout=180, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
