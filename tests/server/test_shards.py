"""A server of several shards: clients get an error if one ends or hangs, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.adapters import make_adapter, peft_logprobs
from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.server_process import PLAIN_CLIENT, ServerProcess
from tgi_asgi.formats.sources import ModelFiles

LONG = {"model": "tgi", "prompt": "abc", "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Return a model whose answers are long enough for a test to interrupt."""
    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(directory)
    return save(make_model(max_position_embeddings=8192), directory)


@contextmanager
def serving(model: ModelFiles, *flags: str, **environ: str) -> Iterator[tuple[ServerProcess, int]]:
    """Run a server with two shards; yield it and the second shard's process id."""
    command = ("tgi_asgi", "--model-id", str(model.path), "--num-shard", "2", "--num-threads", "1", *flags)
    with ServerProcess(*command, environ=environ) as server:
        server.wait_until_healthy()
        (other,) = children_of(server.process.pid)
        yield server, other
    wait_for(lambda: not is_running(other))


def children_of(parent: int) -> list[int]:
    """Return the ids of a process's children."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # the process has ended
            continue
        if int(lines["PPid"]) == parent:
            found.append(int(lines["Pid"]))
    return found


def is_running(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_for(holds: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


@contextmanager
def stream(server: ServerProcess, max_tokens: int = 8000) -> Iterator[Iterator[str]]:
    """Start a long answer; yield its lines after the first."""
    with (
        PLAIN_CLIENT(timeout=60) as client,
        client.stream(
            "POST", f"{server.url}/v1/completions", json={**LONG, "max_tokens": max_tokens}
        ) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        yield lines


def last_event(lines: Iterator[str]) -> dict[str, object]:
    """Return a stream's last event; check that the stream ends with [DONE]."""
    *_, last, end = (line.removeprefix("data: ") for line in lines if line)
    assert end == "[DONE]"
    found: dict[str, object] = json.loads(last)
    return found


def test_a_shard_that_dies_ends_the_server_with_an_error_event(model: ModelFiles) -> None:
    with serving(model) as (server, other):
        with stream(server) as lines:
            os.kill(other, signal.SIGKILL)
            assert "error" in last_event(lines)
        assert server.wait() == 1
        assert "shard 1 of the model has ended" in server.output()


@pytest.mark.soak  # `make test` already starts three servers of two processes
def test_a_shard_that_hangs_meets_the_step_timeout_and_is_not_left_behind(model: ModelFiles) -> None:
    with serving(model, "--step-timeout-s", "1") as (server, other):
        with stream(server) as lines:
            os.kill(other, signal.SIGSTOP)
            assert "error" in last_event(lines)
        assert server.wait() == 1
        assert "a step has not ended" in server.output()


def test_no_shard_outlives_a_server_that_is_killed(model: ModelFiles) -> None:
    with serving(model) as (server, other), stream(server):
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        wait_for(lambda: not is_running(other))


def test_a_signal_to_all_of_them_lets_an_answer_finish(model: ModelFiles) -> None:
    """A terminal's Ctrl-C and systemd's stop do this."""
    with serving(model) as (server, other):
        with stream(server, max_tokens=400) as lines:
            for process in (server.process.pid, other):
                os.kill(process, signal.SIGINT)
            assert "error" not in last_event(lines)
        assert server.wait() == 0
        assert "Traceback" not in server.output()


def test_adapters_named_at_start_and_loaded_later_answer_as_with_peft(
    model: ModelFiles, tmp_path: Path
) -> None:
    """Memory holds one adapter, so that each request reads its own again, in both shards."""
    assert model.path is not None
    one, two = (make_adapter(model.path, tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1))
    flags = ["--dtype", "float32", "--max-cpu-loras", "1", "--admin-api-key", "root"]
    flags.append("--enable-prefill-logprobs")
    with (
        serving(model, *flags, LORA_ADAPTERS=f"one={one}") as (server, _),
        PLAIN_CLIENT(base_url=server.url, headers={"authorization": "Bearer root"}, timeout=60) as client,
    ):

        def load(name: str, path: Path) -> httpx.Response:
            return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

        failed = load("two", tmp_path)
        assert failed.status_code == 400 and "adapter_config.json" in failed.text
        assert load("two", two).status_code == 200
        listed = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert listed[1:] == ["one", "two"]
        texts = set[str]()
        for name, folder in (("one", one), ("two", two), ("one", one), (None, None)):
            given = {"adapter_id": name, "max_new_tokens": 8, "details": True, "decoder_input_details": True}
            answer = client.post("/generate", json={"inputs": "abc", "parameters": given}).json()
            details, texts = answer["details"], texts | {answer["generated_text"]}
            ids = [each["id"] for each in (*details["prefill"], *details["tokens"])]
            first = len(details["prefill"])
            rows = peft_logprobs(model.path, folder, ids)[first - 1 : -1]
            for row, token in zip(rows, details["tokens"], strict=True):
                assert token["id"] == row.argmax()
                assert token["logprob"] == pytest.approx(float(row[token["id"]]), abs=2e-3)
        assert len(texts) == 3
