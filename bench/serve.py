"""Latency and throughput of a server over sockets: OpenAI's streaming chat, closed and open loop.

    python -m bench.serve                                         # starts this project's server
    python -m bench.serve --model-id model.gguf --clients 1,16,64 --rates 4,8 --out bench/results/serve.json
    python -m bench.serve --url http://127.0.0.1:8000 --model name  # a server that runs already, of any make

Prompts are fresh, so that no prefix cache helps (--shared-tokens gives them a common beginning); decoding is
greedy and continues past EOS. Unknown flags go to the project's server. Prints one JSON object and a table;
--picture writes the distributions of TTFT and inter-token latency as SVG.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import picture
from bench.bandwidth import read_bandwidth
from bench.loads import ClosedLoop, Measured, OpenLoop, Prompts, Target, run
from bench.report import command_line, emit, machine, numbers, table
from bench.servers import Server

ROUNDS = 3  # closed loop: requests per client, unless --requests is given
MIN_REQUESTS = 8  # per load


def loads_of(options: argparse.Namespace) -> list[ClosedLoop | OpenLoop]:
    """Return the loads that the command line asks for."""
    count = options.requests
    closed = [ClosedLoop(n, count or max(ROUNDS * n, MIN_REQUESTS)) for n in options.clients]
    opened = [OpenLoop(rate, count or max(int(20 * rate), 20), options.seed) for rate in options.rates]
    return [*closed, *opened]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe requests and loads; shared with bench.peers."""
    parser.add_argument("--clients", type=numbers(int), default=[1, 16, 64], help="closed loop: 1,16,64")
    parser.add_argument("--rates", type=numbers(float), default=[], help="open loop: requests a second")
    parser.add_argument("--requests", type=int, help=f"a load (default {ROUNDS} a client, 20 s open loop)")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--shared-tokens", type=int, default=0, help="common beginning of all prompts")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--target-ttft-ms", type=float, default=1000.0, help="goodput: first token within")
    parser.add_argument("--target-tpot-ms", type=float, default=50.0, help="goodput: mean time of a token")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals in open loop")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")


def measure(
    url: str, model: str, loads: Sequence[ClosedLoop | OpenLoop], options: argparse.Namespace
) -> list[Measured]:
    """Run the loads one after another, after a request that warms up the server."""
    found = []
    warm_up = Prompts(options.prompt_tokens)
    asyncio.run(run(ClosedLoop(1, 2), warm_up, url, max_tokens=8, model=model))
    for load in loads:
        prompts = Prompts(options.prompt_tokens, shared_tokens=options.shared_tokens)
        found.append(asyncio.run(run(load, prompts, url, max_tokens=options.max_tokens, model=model)))
    return found


HEAD = ("load", "tok/s", "tok/s a request p50", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "good/s")


def row_of(summary: dict[str, Any]) -> list[Any]:
    """Return a load's row of the table."""
    if "seconds" not in summary:
        return [summary["load"], f"failed: {summary.get('first_error')}", *[None] * (len(HEAD) - 2)]
    ttft, itl = summary["ttft_ms"], summary["itl_ms"]
    return [
        summary["load"] + (f" ({summary['failed']} failed)" if summary["failed"] else ""),
        summary["tokens_per_s"],
        summary["request_tokens_per_s"]["p50"],
        *ttft.values(),
        *itl.values(),
        summary["goodput_per_s"],
    ]


@contextlib.contextmanager
def server_of(options: argparse.Namespace, arguments: list[str]) -> Iterator[tuple[str, Server | None]]:
    """Yield the address of the server to measure; start the project's server if none was named."""
    if options.url:
        yield options.url, None
        return
    with Server.ours(arguments) as server:
        yield server.url, server


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", help="base address of a running server")
    parser.add_argument("--model", default="tgi", help="name that requests give")
    parser.add_argument("--picture", type=Path, help="write the distributions here (.svg)")
    add_arguments(parser)
    options, arguments = parser.parse_known_args()
    if options.url and arguments:
        parser.error(f"unknown with --url: {' '.join(arguments)}")
    loads = loads_of(options)
    target = Target(options.target_ttft_ms, options.target_tpot_ms)
    gb_per_s = read_bandwidth()
    record: dict[str, Any] = {
        "bench": "serve",
        "command": command_line(),
        "machine": machine(),
        "read_gb_per_s": gb_per_s,
        "max_tokens": options.max_tokens,
        "target_ms": {"ttft": target.ttft_ms, "tpot": target.tpot_ms},
    }
    with server_of(options, arguments) as (url, server):
        found = measure(url, options.model, loads, options)
        if server is not None:
            record["start_s"] = round(server.start_s, 2)
            record["memory_mib"] = round(server.memory_mib())
    record["loads"] = [measured.summary(target) for measured in found]
    emit(record, options.out)
    print(table(HEAD, map(row_of, record["loads"])))
    print(f"memory is read at {gb_per_s} GB/s; times in ms; good: {target}")
    if options.picture:
        draw(found, options.picture, f"{options.prompt_tokens} tokens in, {options.max_tokens} out")
    if any(measured.errors for measured in found):
        sys.exit("some requests failed")


def draw(found: Sequence[Measured], path: Path, title: str) -> None:
    """Draw the distributions of TTFT and ITL of each load."""
    ttft = {m.load: [a.ttft_s * 1e3 for a in m.answers] for m in found}
    itl = {m.load: [max(gap * 1e3, 0.01) for a in m.answers for gap in a.itl_s] for m in found}
    panels = {"time to first token": ttft, "inter-token latency": itl}
    picture.draw(panels, path, title=title, unit="ms")


if __name__ == "__main__":
    main()
