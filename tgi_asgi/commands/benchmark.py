"""`tgi-asgi benchmark`: how fast a server is from its clients' point of view, for growing numbers of clients.

It replaces TGI's `text-generation-benchmark` and keeps its option names. TGI's tool spoke to the shards,
bypassing the router. This one streams /v1/completions over HTTP, so its figures include everything that a
client waits for, and it can measure any server with OpenAI's API: TGI before a migration, this server after
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from tqdm import tqdm

from tgi_asgi import __version__
from tgi_asgi.commands.figures import Load, table_head, table_row
from tgi_asgi.commands.stream_client import Address, Answer, Client, RequestFailed

_F = TypeVar("_F", bound=Callable[..., Any])

_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_PATH = "/v1/completions"
_POLL_S = 0.1
_STOP_TIMEOUT_S = 30.0
# Each word is at least one token in any vocabulary, so a prompt of n words can be truncated to n tokens.
_WORDS = "day way man life child world group word eye job side head house law car"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send: lengths of prompts and answers in tokens, and the number of requests per client."""

    prompt_length: int
    decode_length: int
    num_runs: int
    num_warmups: int
    seed: int
    body: dict[str, Any]  # extra fields of every request

    def request(self, model: str, number: int) -> dict[str, Any]:
        """Return a request's body; no two numbers' prompts begin alike, so prefix caches do not help."""
        words = random.Random(f"{self.seed}/{number}").choices(_WORDS.split(), k=self.prompt_length)
        return {
            "model": model,
            "prompt": " ".join(words),
            "truncate_prompt_tokens": self.prompt_length,  # exact on servers that support it: this one, vLLM
            "max_tokens": self.decode_length,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.body,
        }


def _count_option(*flags: str, default: int, help: str, least: int = 1) -> Callable[[_F], _F]:
    """Return the decorator of an option whose value is a number."""
    return click.option(
        *flags, metavar="N", type=click.IntRange(least), default=default, show_default=True, help=help
    )


@click.command("benchmark")
@click.option(
    "-u", "--url", metavar="URL", help="Server to measure (default: port $PORT or 3000 on this machine)."
)
@click.option("--model-id", metavar="TEXT", help="Start a server for this model, measure and stop it.")
@click.option("--model", metavar="NAME", help="Name to send as `model` (default: the first of /v1/models).")
@click.option("--api-key", envvar="API_KEY", metavar="KEY", help="Bearer token to send.")
@click.option(
    "-b", "--batch-size", "--concurrency", "batch_sizes", multiple=True, metavar="N",
    help="Concurrent streams, or several numbers separated by commas (repeatable; default: 1,2,4,8,16,32).",
)  # fmt: skip
@_count_option("-s", "--sequence-length", default=256, help="Tokens per prompt.")
@_count_option("-d", "--decode-length", default=64, help="Tokens per answer.")
@_count_option("-r", "--runs", default=10, help="Requests per stream.")
@_count_option("-w", "--warmups", default=1, least=0, help="Requests per stream before that, not counted.")
@click.option("--seed", type=int, metavar="N", help="Seed of the prompts' words (default: random).")
@click.option("--body", default="{}", metavar="JSON", help='Additional request fields: {"temperature": 0.7}.')
@click.option(
    "--json", "json_file", type=click.File("w"), metavar="FILE", help="File for the figures (-: stdout)."
)
@click.option("-t", "--tokenizer-name", metavar="TEXT", help="Ignored, for TGI: the server counts tokens.")
@click.argument("server_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVER FLAGS]")
def command(
    url: str | None, model_id: str | None, model: str | None, api_key: str | None,
    batch_sizes: tuple[str, ...], sequence_length: int, decode_length: int,
    runs: int, warmups: int, seed: int | None, body: str,
    json_file: TextIO | None, tokenizer_name: str | None, server_flags: tuple[str, ...],
) -> None:  # fmt: skip
    """Measure a server: time to first token, time per token, throughput.

    For each number of streams, that many clients send requests one after the other, each with its own prompt.
    With --model-id, a server is started for the measurement, with the flags after `--`.

    \b
        tgi-asgi benchmark --url http://localhost:8080 -b 1,8,32
        tgi-asgi benchmark --model-id org/name --json figures.json -- --num-threads 4
    """
    del tokenizer_name
    if url is not None and model_id is not None:
        raise click.UsageError("--url and --model-id are mutually exclusive")
    if server_flags and model_id is None:
        raise click.UsageError("server flags need --model-id, which starts a server")
    if seed is None:  # a server's prefix cache may hold the prompts of an earlier run
        seed = random.randrange(1 << 32)
    plan = Plan(sequence_length, decode_length, runs, warmups, seed, _read_body(body))
    counts = _read_counts(batch_sizes)
    # The table must not go to stdout if the figures do.
    show = not (json_file is not None and json_file.name in ("-", "<stdout>"))
    try:
        with contextlib.ExitStack() as stack:
            if model_id is not None:
                url = stack.enter_context(own_server(model_id, server_flags, api_key))
            url = url or f"http://127.0.0.1:{os.environ.get('PORT') or 3000}"
            address = Address.parse(url)
            echo: Callable[[str], None] = click.echo if show else lambda line: None
            report = asyncio.run(measure(address, api_key, model, plan, counts, echo))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except RequestFailed as error:
        raise click.ClickException(f"{url}: {error}") from None
    if json_file is not None:
        json.dump({"url": url, **report}, json_file, indent=2)
        json_file.write("\n")
    if any(each["failed"] for each in report["loads"]):
        sys.exit(1)


def _read_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--body must be JSON ({error})") from None
    if not isinstance(body, dict):
        raise click.UsageError(f"--body must be an object, got {text}")
    return body


def _read_counts(texts: tuple[str, ...]) -> tuple[int, ...]:
    words = [word for text in texts for word in text.split(",")]
    try:
        counts = tuple(int(word) for word in words)
    except ValueError:
        counts = (0,)
    if any(count < 1 for count in counts):
        raise click.UsageError(f"--batch-size must be numbers of at least 1, got {', '.join(words)}")
    return counts or _BATCH_SIZES


async def measure(
    address: Address,
    api_key: str | None,
    model: str | None,
    plan: Plan,
    counts: tuple[int, ...],
    echo: Callable[[str], None],
) -> dict[str, Any]:
    """Run the loads one after the other, print a line for each, and return the report.

    Raises:
        RequestFailed: if the server does not answer.
    """
    model = model or await _first_model(address, api_key)
    echo(f"{model}: prompts of {plan.prompt_length} tokens, answers of {plan.decode_length}")
    echo(table_head())
    loads, number = [], 0
    for count in counts:
        clients = [Client(address, api_key) for _ in range(count)]
        try:
            await _run(clients, plan, plan.num_warmups, model, number)
            number += count * plan.num_warmups
            load = await _run(clients, plan, plan.num_runs, model, number)
            number += count * plan.num_runs
        finally:
            for client in clients:
                await client.close()
        loads.append(load.figures())
        echo(table_row(loads[-1]))
        if load.failures:
            echo(f"  first failure: {load.failures[0]}")
    return {
        "model": model,
        "tgi_asgi": __version__,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "prompt_length": plan.prompt_length,
        "decode_length": plan.decode_length,
        "runs": plan.num_runs,
        "seed": plan.seed,
        "loads": loads,
    }


async def _first_model(address: Address, api_key: str | None) -> str:
    client = Client(address, api_key)
    try:
        status, found = await client.get("/v1/models")
    finally:
        await client.close()
    try:
        return str(found["data"][0]["id"])
    except (LookupError, TypeError):
        raise RequestFailed(f"/v1/models returned {status} and no model: use --model") from None


async def _run(clients: list[Client], plan: Plan, num_each: int, model: str, first: int) -> Load:
    """Let each client send `num_each` requests, one after the other, numbered from `first`."""
    recordings, failures = [], []
    bodies = iter(plan.request(model, first + i) for i in range(len(clients) * num_each))
    bar = tqdm(
        total=len(clients) * num_each,
        desc=f"{len(clients)} at once",
        leave=False,
        disable=None,
        file=sys.stderr,
    )

    async def send(client: Client) -> None:
        for _ in range(num_each):
            try:
                recordings.append(await client.stream(_PATH, next(bodies)))
            except RequestFailed as error:
                failures.append(str(error))
            bar.update()

    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(send(client))
    seconds = time.perf_counter() - start_s
    bar.close()
    answers: list[Answer] = []
    for recording in recordings:
        try:
            answers.append(recording.read())
        except RequestFailed as error:
            failures.append(str(error))
    return Load(len(clients), seconds, tuple(answers), tuple(failures))


@contextlib.contextmanager
def own_server(model_id: str, flags: tuple[str, ...], api_key: str | None) -> Iterator[str]:
    """Start a server for a model on a Unix socket; yield its URL once it is ready, and stop it at the end.

    Raises:
        click.ClickException: if it ended before it was ready; the message is its last line.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # an exception: it must stop the server, too
    with tempfile.TemporaryDirectory(prefix="tgi-asgi-") as folder:
        path, log = Path(folder) / "socket", Path(folder) / "log"
        command = [sys.executable, "-m", "tgi_asgi", "--model-id", model_id, "--uds", str(path), *flags]
        environ = {**os.environ, **({"API_KEY": api_key} if api_key else {})}
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"unix:{path}"
            click.echo(f"starting a server for {model_id} ...", err=True)
            while not asyncio.run(_is_ready(Address.parse(url))):
                if process.poll() is not None:
                    lines = log.read_text(errors="replace").strip().splitlines()
                    raise click.ClickException((lines or [f"the server ended with {process.returncode}"])[-1])
                time.sleep(_POLL_S)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _is_ready(address: Address) -> bool:
    client = Client(address, None)
    try:
        return (await client.get("/health"))[0] == 200
    except RequestFailed:
        return False
    finally:
        await client.close()
