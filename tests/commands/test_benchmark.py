"""`tgi-asgi benchmark` against real servers, native and foreign; its arithmetic checked by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.commands import run_command
from tests.support.server_process import ServerProcess
from tgi_asgi.cli import make_command
from tgi_asgi.commands.figures import Load, percentile, table_head, table_row
from tgi_asgi.commands.stream_client import Address, Answer, Client, Recording, RequestFailed


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Yield a server whose steps take 20 ms and that requires an API key."""
    environ = {"API_KEY": "secret", "FAKE_STEP_S": "0.02"}
    with ServerProcess("tests.server.fake_server", "--model-id", "fake", environ=environ) as server:
        server.wait_until_healthy()
        yield server


def benchmark(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return run_command("benchmark", *arguments, **environ)


def commands_running() -> str:
    """Return the command lines of all processes, one per line."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            lines.append(path.read_text(errors="replace"))
    return "\n".join(lines)


def test_a_running_server_is_measured(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["-b", "1,3", "-s", "40", "-d", "10", "-r", "2", "--json", str(path)]
    run = benchmark("--url", server.url, *options, API_KEY="secret")
    assert run.returncode == 0, run.stderr
    report = json.loads(path.read_text())
    assert (report["url"], report["prompt_length"], report["decode_length"]) == (server.url, 40, 10)
    one, three = report["loads"]
    assert (one["batch_size"], one["requests"], one["failed"]) == (1, 2, 0)
    assert (three["batch_size"], three["requests"], three["failed"]) == (3, 6, 0)
    for load in (one, three):
        assert (load["prompt_tokens"], load["output_tokens"]) == (40, 10)  # exactly the requested lengths
        assert load["time_per_token_ms"]["p50"] > 15  # a step takes 20 ms, minus the timers' slack
        assert load["request_ms"]["p50"] >= load["time_to_first_token_ms"]["p50"] + 9 * 15
        assert load["output_tokens_per_s"] == pytest.approx(10 * load["requests"] / load["seconds"])
    lines = run.stdout.splitlines()
    assert "prompts of 40 tokens, answers of 10" in lines[0]
    assert [line.split()[0] for line in lines[3:]] == ["1", "3"]


def test_the_server_of_this_machine_s_port_is_measured_where_none_is_named(server: ServerProcess) -> None:
    arguments = ["-b", "2", "-s", "8", "-d", "3", "-r", "1", "--json", "-"]
    run = benchmark(*arguments, PORT=str(server.port), API_KEY="secret")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["loads"][0]["requests"] == 2  # stdout contains nothing else


def test_streams_as_tgi_writes_them_are_measured() -> None:
    """Their usage comes with the last token, so the benchmark does not request usage."""
    environ = {"FAKE_STEP_S": "0.02"}
    with ServerProcess(
        "tests.server.fake_server", "--model-id", "fake", "--tgi-compat", environ=environ
    ) as tgi:
        tgi.wait_until_healthy()
        run = benchmark("--url", tgi.url, "-b", "2", "-s", "16", "-d", "4", "-r", "1", "--json", "-")
    assert run.returncode == 0, run.stderr
    load = json.loads(run.stdout)["loads"][0]
    assert (load["requests"], load["failed"], load["output_tokens"]) == (2, 0, 4)
    assert load["time_per_token_ms"]["p50"] > 15


def test_a_server_is_started_measured_and_stopped(demo_gguf: Path) -> None:
    options = ["-b", "2", "-s", "32", "-d", "4", "-r", "1", "-w", "0", "--json", "-"]
    run = benchmark("--model-id", str(demo_gguf), "--api-key", "secret", *options, "--", "--num-threads", "1")
    assert run.returncode == 0, run.stderr
    load = json.loads(run.stdout)["loads"][0]
    assert (load["prompt_tokens"], load["output_tokens"], load["requests"]) == (32, 4, 2)
    assert f"{demo_gguf}\0--uds" not in commands_running()


def test_two_runs_send_different_prompts_and_a_seed_the_same(server: ServerProcess) -> None:
    """Otherwise the prefix cache would serve the second run."""
    options = ["--url", server.url, "-b", "1", "-s", "4", "-d", "1", "-r", "1", "--json", "-"]
    seeds = [json.loads(benchmark(*options, API_KEY="secret").stdout)["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]
    chosen = json.loads(benchmark(*options, "--seed", "7", API_KEY="secret").stdout)
    assert chosen["seed"] == 7


def test_a_key_that_is_wanted_and_not_given_is_said(server: ServerProcess) -> None:
    run = benchmark("--url", server.url)
    assert run.returncode == 1
    assert "/v1/models returned 401" in run.stderr


def test_failures_are_counted_shown_and_the_exit_code(server: ServerProcess) -> None:
    run = benchmark("--url", server.url, "-b", "1", "-s", "5000", "-r", "2", "-w", "0", API_KEY="secret")
    assert run.returncode == 1
    row, reason = run.stdout.splitlines()[-2:]
    assert row.split() == ["1", *"-" * 6, "0.0", "0.0", "0", "0.00", "2"]
    assert "first failure: 400:" in reason


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--url", "http://127.0.0.1:9"], 1, "http://127.0.0.1:9: "),
        (["--url", "localhost:3000"], 2, "a URL must be http://HOST:PORT"),
        (["--url", "http://h", "--model-id", "m"], 2, "are mutually exclusive"),
        (["--", "--num-threads", "1"], 2, "need --model-id"),
        (["-b", "1,x"], 2, "--batch-size must be numbers of at least 1, got 1, x"),
        (["-b", "0"], 2, "--batch-size must be numbers"),
        (["--body", "[]"], 2, "--body must be an object"),
        (["--body", "{"], 2, "--body must be JSON"),
        (["-d", "0"], 2, "x>=1"),
        (["--model-id", "there/is/none.gguf"], 1, "no such file or directory: there/is/none.gguf"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], code: int, message: str) -> None:
    run = CliRunner().invoke(make_command(), ["benchmark", *arguments])
    assert run.exit_code == code, run.output
    assert message in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.output


# The client and the arithmetic.


def _recorded(*pieces: tuple[float, bytes]) -> Recording:
    return Recording(10.0, list(pieces), end_s=20.0)


def _event(text: str, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}], **more}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\ndata: [DONE]\n\n'


def test_a_stream_is_read_by_when_its_events_were_whole() -> None:
    first, second = _event("a"), _event("bc")
    answer = _recorded(
        (11.0, b": waiting\n\n" + first[:5]), (12.0, first[5:]), (13.0, second), (14.0, _event("")),
        (15.0, USAGE),
    ).read()  # fmt: skip
    assert answer == Answer(10.0, (12.0, 13.0), 20.0, 5, 3)
    assert (answer.first_s, answer.per_token_s, answer.pauses_s) == (2.0, 0.5, [1.0])


def test_windows_line_ends_are_read() -> None:
    assert _recorded((11.0, _event("a").replace(b"\n", b"\r\n")), (12.0, USAGE)).read().text_s == (11.0,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_event("a"), "no usage or no text"),
        (USAGE, "no usage or no text"),
        (_event("a", usage={"prompt_tokens": 5}), "no usage or no text"),
        (_event("a") + b'data: {"error": {"message": "gone"}}\n\n', "gone"),
        (b'data: {"error": "Model is overloaded", "error_type": "overloaded"}\n\n', "Model is overloaded"),
    ],
)
def test_a_stream_that_is_not_whole_is_a_failure(data: bytes, message: str) -> None:
    with pytest.raises(RequestFailed, match=message):
        _recorded((11.0, data)).read()


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert Answer(0.0, (1.0,), 1.0, 5, 1).per_token_s is None


@pytest.mark.parametrize(("percent", "value"), [(50, 5), (90, 9), (99, 10), (100, 10), (1, 1)])
def test_percentiles_are_by_the_nearest_rank(percent: float, value: float) -> None:
    assert percentile([3, 1, 2, 10, 9, 8, 7, 6, 5, 4], percent) == value
    assert percentile([4.0], percent) == 4.0


def test_a_load_s_figures_are_those_of_its_answers() -> None:
    answers = (Answer(0.0, (1.0, 2.0, 3.0), 3.5, 10, 3), Answer(0.5, (1.0,), 1.0, 20, 1))
    figures = Load(2, 4.0, answers, ("429: full",)).figures()
    assert (figures["requests"], figures["failed"], figures["batch_size"]) == (2, 1, 2)
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (15, 2)
    assert figures["time_to_first_token_ms"] == {"mean": 750, "p50": 500, "p90": 1000, "p99": 1000}
    assert figures["time_per_token_ms"]["p50"] == 1000
    assert figures["pause_ms"]["p99"] == 1000
    assert figures["request_ms"]["p99"] == 3500
    assert (figures["prompt_tokens_per_s"], figures["output_tokens_per_s"]) == (7.5, 1)
    assert figures["requests_per_s"] == 0.5
    title, names = table_head().splitlines()
    row = table_row(figures)
    assert len(title) == len(names) == len(row) <= 110
    assert " ".join(row.split()) == "2 500.0 1,000.0 1,000.0 1,000.00 1,000.00 1,000.0 7.5 1.0 2 0.50 1"


@pytest.mark.parametrize(
    ("url", "address", "authority"),
    [
        ("http://h", Address("h", 80), "h:80"),
        ("https://h/base/", Address("h", 443, "/base", True), "h:443"),
        ("http://[::1]:3000", Address("::1", 3000), "[::1]:3000"),
        ("unix:/run/s", Address("localhost", socket_path="/run/s"), "localhost"),
    ],
)
def test_urls_are_read(url: str, address: Address, authority: str) -> None:
    assert (Address.parse(url), Address.parse(url).authority) == (address, authority)


@contextlib.asynccontextmanager
async def serving(serve: Callable[..., Any]) -> AsyncIterator[Address]:
    """Serve connections with a coroutine; yield the address."""
    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()


async def test_a_connection_is_kept_and_one_that_the_server_closes_is_made_anew() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for more in (b"", b"Connection: close\r\n"):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n" + more + b"Content-Length: 2\r\n\r\n[]")
        writer.close()
        await writer.wait_closed()

    async with serving(serve) as address:
        client = Client(address, None)
        assert [await client.get("/") for _ in range(4)] == [(200, [])] * 4
        assert connections == 2
        await client.close()


async def test_an_answer_that_is_cut_short_is_a_failure() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]")
        writer.close()
        await writer.wait_closed()

    async with serving(serve) as address:
        client = Client(address, "key")
        with pytest.raises(RequestFailed):
            await client.stream("/v1/completions", {})
        await client.close()
