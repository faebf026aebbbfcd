"""A server process's life: it answers while it loads, drains on a signal, and exits with the right code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from tests.support.forked import ROOT
from tests.support.server_process import (
    NEW_INTERPRETER,
    PLAIN_CLIENT,
    START_TIMEOUT_S,
    ServerProcess,
    free_port,
)

MODULE = "tests.server.fake_server"
ENDLESS = {
    "model": "tgi",
    "messages": [{"role": "user", "content": "go"}],
    "max_tokens": 4000,
    "stream": True,
}


SHORT = {"inputs": "hi", "parameters": {"max_new_tokens": 3}}


def _server(model: str = "ok", *arguments: str) -> ServerProcess:
    return ServerProcess(MODULE, "--model-id", "fake", *arguments, environ={"FAKE_MODEL": model})


def _events(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


def test_the_port_answers_503_with_progress_while_the_model_loads(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    with _server(f"waits:{fifo}") as server:
        health = server.wait_until(503)
        assert health.headers["retry-after"].isdigit()
        assert health.json()["state"] == "loading"
        answer = server.post("/v1/chat/completions", json=ENDLESS)
        assert (answer.status_code, answer.headers["retry-after"].isdigit()) == (503, True)
        assert "loading" in answer.json()["error"]["message"]
        fifo.write_bytes(b"")  # lets the loader continue
        server.wait_until_healthy()
        assert server.get("/info").status_code == 200


def test_start_up_says_what_is_served_and_how_to_try_it() -> None:
    with ServerProcess(MODULE, "--model-id", "fake", program=NEW_INTERPRETER) as server:
        server.wait_until_healthy()
        server.signal()
        assert server.wait() == 0
        text = server.output()
    assert "ToyForCausalLM" in text
    assert "float32 on cpu" in text
    assert "4,096 tokens" in text
    assert f"curl {server.url}/v1/chat/completions" in text
    assert "Running on" not in text


def _metric(server: ServerProcess, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))


def test_a_client_that_leaves_frees_its_blocks_within_two_steps() -> None:
    steps = 'tgi_batch_inference_count{method="decode"}'
    with ServerProcess(MODULE, "--model-id", "fake", environ={"FAKE_STEP_S": "0.2"}) as server:
        server.wait_until_healthy()
        with server.stream("/v1/chat/completions", ENDLESS) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert _metric(server, "tgi_kv_cache_usage_ratio") > 0
            before = _metric(server, steps)
        while _metric(server, "tgi_kv_cache_usage_ratio") > 0:
            assert _metric(server, steps) <= before + 3  # the step that was running, and two more
        assert _metric(server, "tgi_requests_running") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish_and_refuses_new_requests(number: signal.Signals) -> None:
    body = {**ENDLESS, "max_tokens": 200}
    with _server() as server:
        server.wait_until_healthy()
        with server.stream("/v1/chat/completions", body) as stream:
            events = _events(stream.iter_lines())
            next(events)
            server.signal(number)
            server.wait_until(503)
            refused = server.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"].isdigit()) == (503, True)
            rest = list(events)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event_and_done() -> None:
    with _server("ok", "--graceful-termination-timeout", "0") as server:
        server.wait_until_healthy()
        with server.stream("/v1/chat/completions", ENDLESS) as stream:
            events = _events(stream.iter_lines())
            next(events)
            server.signal()
            rest = list(events)
        assert rest[-1] == "[DONE]"
        assert "error" in json.loads(rest[-2])
        assert server.wait() == 0


def test_connections_that_the_end_cuts_off_are_no_errors() -> None:
    with _server("ok", "--graceful-termination-timeout", "0") as server:
        server.wait_until_healthy()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            server.get("/health")  # the partial request has been read by then
            server.signal()
            assert server.wait() == 0
        assert "Traceback" not in server.output() and "ERROR" not in server.output()


def test_a_server_that_leaves_is_not_ready_and_still_answers() -> None:
    with _server("ok", "--drain-delay", "3600") as server:
        server.wait_until_healthy()
        assert server.get("/readyz").status_code == 200
        server.signal()
        while server.get("/readyz").status_code != 503:
            assert server.process.poll() is None
        assert server.post("/generate", json=SHORT).status_code == 200
        _insist(server)
        assert server.wait() == 128 + signal.SIGTERM


def test_keys_are_read_again_on_a_hangup(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old")
    with _server("ok", "--api-key-file", str(file)) as server:
        server.wait_until_healthy()
        assert _status_with(server, "old") == 200
        file.write_text("new")
        server.signal(signal.SIGHUP)
        while _status_with(server, "new") != 200:
            assert server.process.poll() is None
        assert _status_with(server, "old") == 401


def test_a_renewed_certificate_is_used_after_a_hangup(tmp_path: Path) -> None:
    chain, key, authority = tmp_path / "chain.pem", tmp_path / "key.pem", trustme.CA()

    def renew(kind: trustme.KeyType) -> None:
        issued = authority.issue_cert("127.0.0.1", key_type=kind)
        chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))

    renew(trustme.KeyType.RSA)
    with _server("ok", "--ssl-certfile", str(chain), "--ssl-keyfile", str(key)) as server:
        server.url = server.url.replace("http:", "https:")
        server.wait_until_healthy()
        address = ("127.0.0.1", server.port)
        first = ssl.get_server_certificate(address)
        key.write_text("half of a key")
        server.signal(signal.SIGHUP)
        while "keeping the current certificate" not in server.output():
            assert server.process.poll() is None
        assert ssl.get_server_certificate(address) == first
        renew(trustme.KeyType.ECDSA)
        server.signal(signal.SIGHUP)
        while (second := ssl.get_server_certificate(address)) == first:
            assert server.process.poll() is None
        assert chain.read_text().startswith(second.strip())


def _status_with(server: ServerProcess, key: str) -> int:
    return server.get("/info", headers={"authorization": f"Bearer {key}"}).status_code


def test_a_second_signal_ends_the_process_at_once() -> None:
    with _server() as server:
        server.wait_until_healthy()
        with server.stream("/v1/chat/completions", ENDLESS) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.signal()
            server.wait_until(503)
            _insist(server)
            assert server.wait() == 128 + signal.SIGTERM


def _insist(server: ServerProcess) -> None:
    """Repeat the signal until it ends the process: those of the first second count as the first."""
    for _ in range(200):
        server.signal()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(0.1)
            return


def test_a_signal_that_is_sent_twice_is_one() -> None:
    """As GNU timeout does: to the process and to its group."""
    with _server() as server:
        server.wait_until_healthy()
        body = {**ENDLESS, "max_tokens": 50}
        with server.stream("/v1/chat/completions", body) as stream:
            events = _events(stream.iter_lines())
            next(events)
            server.signal()
            server.signal(signal.SIGINT)  # another number: two equal ones may become one on the way
            rest = list(events)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0


def test_an_engine_that_does_not_stop_does_not_keep_the_process() -> None:
    with _server("stuck") as server:
        server.wait_until_healthy()
        server.signal()
        assert server.wait() == 0


def test_a_signal_while_the_model_loads_ends_the_process(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    with _server(f"waits:{fifo}", "--json-output") as server:
        server.wait_until(503)
        server.signal()
        assert server.wait() == 0
        assert json.loads(server.output().splitlines()[-1])["message"] == "stopped while loading"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("missing", "model.gguf: no such file"),
        ("crash", "RuntimeError: a bug in a loader"),
        ("large", "the system refuses memory for the model: std::bad_alloc"),
    ],
)
def test_a_failed_load_exits_with_1_and_the_reason_last(model: str, reason: str) -> None:
    with _server(model) as server:
        assert server.wait() == 1
        assert server.output().splitlines()[-1] == f"tgi-asgi: {reason}"
        assert ("Traceback" in server.output()) is (model == "crash")


def test_a_dead_engine_ends_its_streams_and_then_the_process() -> None:
    with _server("dies") as server:
        server.wait_until_healthy()
        answer = server.post("/generate", json={"inputs": "go"})
        assert answer.status_code in (424, 500, 503)
        assert answer.json()["error_type"]
        assert server.wait() == 1


def test_an_engine_that_dies_while_it_drains_is_no_success() -> None:
    """The step that hangs is the tenth, and the signal comes before it."""
    environ = {"FAKE_MODEL": "hangs", "FAKE_STEP_S": "0.1"}
    arguments = ("--model-id", "fake", "--step-timeout-s", "1")
    with ServerProcess(MODULE, *arguments, environ=environ) as server:
        server.wait_until_healthy()
        with server.stream("/v1/chat/completions", ENDLESS) as stream:
            events = _events(stream.iter_lines())
            next(events)
            server.signal()
            rest = list(events)
        assert "error" in json.loads(rest[-2])
        assert server.wait() == 1
        lines = server.output().splitlines()
        assert any("draining" in line for line in lines)
        assert lines[-1].startswith("tgi-asgi: a step has not ended")


def test_a_port_that_is_taken_is_one_line_and_exit_code_1() -> None:
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        with ServerProcess(MODULE, "--model-id", "fake", port=holder.getsockname()[1]) as server:
            assert server.wait() == 1
            (line,) = server.output().splitlines()
            assert f"port {server.port}: Address already in use" in line


def _under_hypercorn(app: str, *flags: str, **environ: str) -> ServerProcess:
    port = free_port()
    command = ("hypercorn", *(flags or ("--workers", "0")), app, "--bind", f"127.0.0.1:{port}")
    return ServerProcess(*command, port=port, environ=environ, program=NEW_INTERPRETER)


def test_under_hypercorn_s_command_it_serves_and_dies_with_its_engine() -> None:
    with _under_hypercorn("tests.server.fake_app:app", MODEL_ID="fake", FAKE_MODEL="dies") as server:
        server.wait_until_healthy()
        answer = server.post("/generate", json={"inputs": "go"})
        assert answer.status_code in (424, 500, 503)
        assert server.wait() == 1


def test_under_hypercorn_s_command_a_missing_model_id_is_an_error() -> None:
    with _under_hypercorn("tgi_asgi.app:app") as server:
        assert server.wait() == 1
        assert "MODEL_ID" in server.output().splitlines()[-1]


def test_under_hypercorn_s_command_a_failed_load_ends_the_process() -> None:
    with _under_hypercorn("tgi_asgi.app:app", MODEL_ID="/nowhere") as server:
        assert server.wait() == 1
        assert "/nowhere" in server.output().splitlines()[-1]
    with _under_hypercorn("tgi_asgi.app:app", MODEL_ID="/nowhere", JSON_OUTPUT="true") as server:
        assert server.wait() == 1
        assert "/nowhere" in json.loads(server.output().splitlines()[-1])["message"]


def test_under_hypercorn_s_command_a_second_worker_is_refused() -> None:
    with _under_hypercorn("tests.server.fake_app:app", "--workers", "2", MODEL_ID="fake") as server:
        server.wait()  # hypercorn's exit code does not reflect its workers'
        assert "start hypercorn with --workers 0" in server.output()


def test_the_port_answers_before_the_code_of_models_is_imported(demo_gguf: Path, tmp_path: Path) -> None:
    """With the real command and model. It takes 0.7 to 1.2 s of processor time on a Zen 3 at work."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command, environ = "tests.server.gated_server", {"GATE": str(gate)}
    with ServerProcess(command, environ=environ, program=NEW_INTERPRETER) as server:
        answer = server.wait_until(503)
        assert answer.json()["state"] == "loading"
        assert _processor_s(server) < 1.5
        gate.write_bytes(b"")
        server.wait_until_healthy()
        assert server.post("/generate", json=SHORT).status_code == 200


def _processor_s(server: ServerProcess) -> float:
    """Return a server's processor time, summed over all threads."""
    text = Path(f"/proc/{server.process.pid}/stat").read_text()
    user, system = text.rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_a_server_that_was_killed_comes_back_on_its_port_and_answers_while_it_loads(tmp_path: Path) -> None:
    """After kill -9 during a stream, the next server listens at once and has no state of the last."""
    port = free_port()
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    with ServerProcess(MODULE, "--model-id", "fake", port=port) as first:
        first.wait_until_healthy()
        with first.stream("/v1/chat/completions", ENDLESS) as stream:
            next(stream.iter_lines())
            first.signal(signal.SIGKILL)
            assert first.wait() == -signal.SIGKILL
            environ = {"FAKE_MODEL": f"waits:{fifo}"}
            with ServerProcess(MODULE, "--model-id", "fake", environ=environ, port=port) as second:
                assert second.wait_until(503).json()["state"] == "loading"
                fifo.write_bytes(b"")
                second.wait_until_healthy()
                answer = second.post("/generate", json=SHORT)
                assert answer.status_code == 200
                assert _metric(second, "tgi_requests_running") == 0


def test_it_serves_from_a_read_only_file_system_without_privileges() -> None:
    """As in the container: no home, no writable folder, no capabilities. Needs root to change mounts."""
    port = free_port()
    script = 'mount --make-rprivate / && mount -o remount,ro,bind / && cd "$0" && exec "$@"'
    isolate = ["unshare", "--mount", "sh", "-c", script, str(ROOT)]
    if subprocess.run([*isolate, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounts cannot be changed here")
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    server = [sys.executable, "-m", MODULE, "--model-id", "fake", "--port", str(port)]
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    with subprocess.Popen([*isolate, *drop, *server], env=environ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            give_up_s = time.monotonic() + START_TIMEOUT_S
            while not _is_healthy(url):
                assert process.poll() is None
                assert time.monotonic() < give_up_s
                time.sleep(0.05)
            assert httpx.post(url + "/generate", json=SHORT, timeout=60).status_code == 200
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError), PLAIN_CLIENT(timeout=5) as client:
        return client.get(url + "/health").status_code == 200
    return False


def test_a_server_without_standard_streams_serves_and_ends_well() -> None:
    shell = ("sh", "-c", 'exec "$0" -m "$@" <&- >&- 2>&-', sys.executable)
    with ServerProcess(MODULE, "--model-id", "fake", program=shell) as server:
        server.wait_until_healthy()
        assert server.post("/generate", json=SHORT).status_code == 200
        server.signal()
        assert server.wait() == 0
