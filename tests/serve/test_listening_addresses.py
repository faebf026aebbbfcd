"""The command at each address where it can listen: TCP, TLS and a Unix socket."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from tests.serve.conftest import ListeningAddress
from tests.server.conftest import require_program
from tests.support.forked import ROOT
from tests.support.server_process import PLAIN_CLIENT, ServerProcess

CHAT = {"model": "tgi", "messages": [{"role": "user", "content": "go"}], "stream": True}
PATH = "/v1/chat/completions"


@pytest.fixture
def server(address: ListeningAddress) -> Iterator[ServerProcess]:
    """Yield a running server that listens there."""
    settings, flags = address.settings, []
    for name in ("uds", "ssl_certfile", "ssl_keyfile"):
        value = getattr(settings, name)
        flags += [f"--{name.replace('_', '-')}", value] if value else []
    client = partial(_client, address)
    with ServerProcess("tests.server.fake_server", "--model-id", "fake", *flags, client=client) as server:
        if address.tls is not None:
            server.url = server.url.replace("http", "https")
        server.wait_until_healthy()
        yield server


def _client(address: ListeningAddress) -> httpx.Client:
    """Return a client for the server at that address."""
    if address.settings.uds is None:
        return httpx.Client(verify=address.tls) if address.tls else PLAIN_CLIENT()
    with socket.socket(socket.AF_UNIX) as probe:  # httpcore leaks a socket that cannot connect
        try:
            probe.connect(address.settings.uds)
        except OSError as error:
            raise httpx.ConnectError("no server listens yet") from error
    return httpx.Client(transport=httpx.HTTPTransport(uds=address.settings.uds, verify=False))


def _metric(client: httpx.Client, server: ServerProcess, name: str) -> float:
    lines = client.get(server.url + "/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))


def test_the_line_that_it_prints_works(server: ServerProcess, address: ListeningAddress) -> None:
    require_program("curl")
    (line,) = (line for line in server.output().splitlines() if line.startswith("curl "))
    environ = {**os.environ, "CURL_CA_BUNDLE": address.authority}
    run = subprocess.run(line, shell=True, env=environ, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip().endswith("data: [DONE]")


def test_a_client_that_leaves_frees_its_blocks(server: ServerProcess) -> None:
    with server.client() as client:
        with client.stream("POST", server.url + PATH, json={**CHAT, "max_tokens": 4000}) as stream:
            lines = stream.iter_lines()
            for _ in range(6):  # two tokens: the metrics are those of the previous step
                next(lines)
            assert _metric(client, server, "tgi_kv_cache_usage_ratio") > 0
        while _metric(client, server, "tgi_kv_cache_usage_ratio") > 0:
            pass  # ends at the latest when the engine has generated 4,000 tokens
        assert _metric(client, server, "tgi_requests_running") == 0


def test_a_signal_lets_a_stream_finish_there(server: ServerProcess) -> None:
    with (
        server.client() as client,
        client.stream("POST", server.url + PATH, json={**CHAT, "max_tokens": 100}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.signal()
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert server.wait() == 0
    assert "Traceback" not in server.output()


def test_the_container_s_health_check_reaches_it(server: ServerProcess, address: ListeningAddress) -> None:
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    healthcheck = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(healthcheck)
    url = f"unix:{address.settings.uds}" if address.settings.uds else server.url
    with contextlib.closing(healthcheck.connect(url)) as connection:
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
