"""Streams through nginx and Caddy with the files of deploy/: token by token, and cancelled in time."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.live_server import LiveServer
from tests.support.scripted_engine import ScriptedChannel, ScriptedEngine, say, scripted_app
from tests.support.server_process import ServerProcess, free_port
from tests.support.system_programs import require_package
from tgi_asgi.errors import TgiError
from tgi_asgi.types import TokenEvent

pytestmark = pytest.mark.deploy
DEPLOY = Path(__file__).parents[2] / "deploy"
START_TIMEOUT_S = 60.0
NUM_TOKENS = 5
CHAT = {"model": "tgi", "messages": [{"role": "user", "content": "go"}], "stream": True}
STREAMS = {
    "/v1/chat/completions": CHAT,
    "/generate_stream": {"inputs": "go"},
    "/api/chat": CHAT,  # Ollama's format: lines of JSON, not server-sent events
}


def _nginx(folder: Path, upstream: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command for nginx with the project's file; `upstream` is `host:port` or `unix:PATH`."""
    nginx = require_package("nginx", "nginx-light")
    text = (DEPLOY / "nginx" / "tgi-asgi.conf").read_text(encoding="utf-8")
    for old, new in (
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("listen [::]:80;", ""),
        ("127.0.0.1:3000", upstream),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "tgi-asgi.conf").write_text(text, encoding="utf-8")
    paths = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # workers must be able to read pytest's folders
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log stderr; worker_processes 1; events {{}}\n"
        f"http {{ access_log off; {paths} include {folder}/tgi-asgi.conf; }}\n",
        encoding="utf-8",
    )
    return [nginx, "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")], {}


def _caddy(folder: Path, upstream: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command for Caddy with the project's file."""
    caddy = require_package("caddy", "caddy")
    path = folder / "Caddyfile"
    path.write_text(f"{{\n\tadmin off\n}}\nimport {DEPLOY}/caddy/Caddyfile\n", encoding="utf-8")
    upstream = upstream.replace("unix:", "unix/")
    environ = {"SITE": f"http://127.0.0.1:{port}", "UPSTREAM": upstream, "HOME": str(folder)}
    return [caddy, "run", "--config", str(path), "--adapter", "caddyfile"], environ


def _is_healthy(url: str) -> bool:
    """Return whether the proxy listens and the server that it forwards to is ready."""
    try:
        return httpx.get(url + "/health", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


PROXIES = {"nginx": _nginx, "caddy": _caddy}


@contextmanager
def running(name: str, folder: Path, upstream: str) -> Iterator[str]:
    """Run a proxy; yield its URL once it serves requests."""
    port = free_port()
    command, environ = PROXIES[name](folder, upstream, port)
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environ}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not _is_healthy(f"http://127.0.0.1:{port}"):
            assert process.poll() is None and time.monotonic() < give_up_s, log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # nginx waits for connections that a failed test has left open
            process.kill()
            process.wait()


class Gate:
    """A script that yields each token only when the test asks for it."""

    def __init__(self) -> None:
        self.num_wanted = 0
        self.channels: list[ScriptedChannel] = []

    async def play(self, channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        self.channels.append(channel)
        num_given = 0
        async for batch in say(*(f"t{i} " for i in range(NUM_TOKENS)))(channel):
            while self.num_wanted <= num_given:
                await asyncio.sleep(0.002)
            yield batch
            num_given += 1


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture(params=PROXIES)
def url(request: pytest.FixtureRequest, tmp_path: Path, gate: Gate) -> Iterator[str]:
    """Yield the URL of a proxy in front of the real app and an engine that waits for the test."""

    def make() -> Any:
        engine = ScriptedEngine()
        engine.script = gate.play
        return scripted_app(engine)

    with (
        LiveServer(make) as server,
        running(request.param, tmp_path, server.url.removeprefix("http://")) as url,
    ):
        yield url


@pytest.mark.parametrize("path", STREAMS)
def test_each_token_comes_before_the_next_is_made(url: str, gate: Gate, path: str) -> None:
    with httpx.Client(timeout=60) as client:
        gate.num_wanted = 1  # a stream's headers come with its first token
        with client.stream("POST", url + path, json=STREAMS[path]) as stream:
            assert stream.status_code == 200
            lines = stream.iter_lines()
            for i in range(NUM_TOKENS):
                gate.num_wanted = i + 1
                next(line for line in lines if f"t{i}" in line)  # times out if the proxy holds the token back
            gate.num_wanted += 1  # let the stream end
            rest = list(lines)
    assert not [line for line in rest if '"error"' in line]


def test_a_body_beyond_the_limit_gets_the_server_s_error(url: str) -> None:
    """Of 17 MB, between the server's limit and the proxy's, and of 20 MB, beyond both."""
    for size in (17_000_000, 20_000_000):
        answer = httpx.post(url + "/v1/completions", content=b"x" * size, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("path", STREAMS)
def test_a_client_that_goes_away_is_noticed_behind_the_proxy(url: str, gate: Gate, path: str) -> None:
    gate.num_wanted = 1
    with httpx.Client(timeout=60) as client, client.stream("POST", url + path, json=STREAMS[path]) as stream:
        assert stream.status_code == 200
        next(line for line in stream.iter_lines() if "t0" in line)
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while not gate.channels[0].is_cancelled:
        assert time.monotonic() < give_up_s, "the request is still running"
        time.sleep(0.01)


def test_errors_come_through_as_they_are_and_metrics_do_not(url: str) -> None:
    answer = httpx.post(url + "/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert httpx.get(url + "/metrics").status_code == 404
    assert httpx.get(url + "/v1/models").json()["object"] == "list"


def _client(path: Path) -> httpx.Client:
    with socket.socket(socket.AF_UNIX) as probe:  # httpcore leaks a socket that cannot connect
        try:
            probe.connect(str(path))
        except OSError as error:
            raise httpx.ConnectError("nobody listens yet") from error
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)))


@pytest.mark.parametrize("name", PROXIES)
def test_a_server_on_a_unix_socket_is_reached(name: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    command = ["tests.server.fake_server", "--model-id", "fake", "--uds", str(path)]
    with ServerProcess(*command, client=partial(_client, path)) as server:
        server.wait_until_healthy()
        with running(name, tmp_path, f"unix:{path}") as url:
            answer = httpx.post(url + "/v1/chat/completions", json={**CHAT, "max_tokens": 3})
            assert answer.status_code == 200
            assert answer.text.rstrip().endswith("data: [DONE]")
