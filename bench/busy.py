"""Servers on cores that other programs use as well: one stream, and a prompt, beside busy loops.

    python -m bench.busy ours=http://127.0.0.1:3000 llama.cpp=http://127.0.0.1:8080 --busy 0,1,2

The servers run already and take turns, in an order that changes from round to round. Each busy loop runs in a
session of its own, as programs in other containers do. Prints one JSON object and a table of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import loads
from bench.report import command_line, commit, emit, machine, numbers, table
from bench.turns import order_of

_SETTLE_S = 0.5  # for the system to spread the busy loops over the cores


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep up to `count` cores busy."""
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


async def measure(url: str, model: str, prompts: loads.Prompts, tokens: int) -> dict[str, float]:
    """Return the seconds of a stream of `tokens`, and those to the first token of a long prompt."""
    load = loads.ClosedLoop(clients=1, requests=1)
    seconds = {}
    for name, length, max_tokens in (("stream", 32, tokens), ("prompt", prompts.tokens, 8)):
        run = await loads.run(load, prompts.resized(length), url, max_tokens=max_tokens, model=model)
        if run.errors:
            raise SystemExit(f"{url}: {run.errors[0]}")
        answer = run.answers[0]
        seconds[name] = answer.ttft_s if name == "prompt" else answer.end_s - answer.due_s
    return seconds


def all_turns(
    options: argparse.Namespace, urls: dict[str, str], prompts: loads.Prompts
) -> list[dict[str, Any]]:
    """Return the turns of all rounds."""
    turns = []
    for index, count in itertools.product(range(options.rounds), options.busy):
        with busy_loops(count):
            time.sleep(_SETTLE_S)
            for name in order_of(list(urls), index):
                seconds = asyncio.run(measure(urls[name], options.model, prompts, options.max_tokens))
                turns.append({"round": index, "busy": count, "server": name, "seconds": seconds})
    return turns


def main() -> None:
    """Run the rounds."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--model", default="tgi", help="name that requests give")
    parser.add_argument("--busy", type=numbers(int), default=[0, 1, 2], help="busy loops: 0,1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    urls = dict(server.split("=", 1) for server in options.servers)
    prompts = loads.Prompts(options.prompt_tokens)
    for url in urls.values():  # the first counts the template's tokens, once for all lengths
        asyncio.run(loads.run(loads.ClosedLoop(1, 1), prompts, url, max_tokens=16, model=options.model))
    turns = all_turns(options, urls, prompts)
    record = {"bench": "busy", "command": command_line(), "commit": commit(), "machine": machine()}
    emit({**record, "turns": turns}, options.out)
    rows = []
    for count, name in itertools.product(options.busy, urls):
        mine = [turn["seconds"] for turn in turns if (turn["busy"], turn["server"]) == (count, name)]
        rows.append([count, name, *(_cell([each[kind] for each in mine]) for kind in ("stream", "prompt"))])
    head = [
        "busy loops", "server", f"{options.max_tokens} tokens, s", f"prompt of {options.prompt_tokens}, s",
    ]  # fmt: skip
    print(table(head, rows), file=sys.stderr)


def _cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
