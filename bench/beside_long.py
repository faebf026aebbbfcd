"""First tokens of short prompts while long ones are computed, one after the other.

    python -m bench.beside_long ours=http://127.0.0.1:3000 before=http://127.0.0.1:3001 --rounds 3

The servers run already and take turns, in an order that changes from round to round. In a turn, one client
sends long prompts and another short ones, at random times. Prints one JSON object and a table of the turns.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from bench import loads
from bench.report import command_line, commit, emit, machine, median, percentile, table
from bench.turns import order_of


async def measure(
    url: str, options: argparse.Namespace, short: loads.Prompts, long: loads.Prompts
) -> dict[str, float]:
    """Return the seconds to the first tokens of short prompts, and to those of the long ones."""
    runs = await asyncio.gather(
        loads.run(
            loads.OpenLoop(rate=options.rate, requests=options.requests), short, url,
            max_tokens=8, model=options.model,
        ),
        loads.run(
            loads.ClosedLoop(clients=1, requests=options.long_requests), long, url,
            max_tokens=1, model=options.model,
        ),
    )  # fmt: skip
    for run in runs:
        if run.errors:
            raise SystemExit(f"{url}: {run.errors[0]}")
    found, of_long = ([answer.ttft_s for answer in run.answers] for run in runs)
    return {
        "p50": percentile(found, 0.5), "p90": percentile(found, 0.9), "max": max(found),
        "long p50": median(of_long, 3),
    }  # fmt: skip


def main() -> None:
    """Run the rounds."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--model", default="tgi", help="name that requests give")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long-tokens", type=int, default=5800)
    parser.add_argument("--long-requests", type=int, default=3, help="of a turn")
    parser.add_argument("--short-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=24, help="short ones of a turn")
    parser.add_argument("--rate", type=float, default=1.7, help="short ones per second")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    urls = dict(server.split("=", 1) for server in options.servers)
    short, long = loads.Prompts(options.short_tokens), loads.Prompts(options.long_tokens)
    for prompts in (short, long):  # counts the template's tokens, once for all servers
        load = loads.ClosedLoop(clients=1, requests=1)
        asyncio.run(loads.run(load, prompts, next(iter(urls.values())), max_tokens=1, model=options.model))
    turns, rows = [], []
    for index in range(options.rounds):
        for name in order_of(list(urls), index):
            seconds = asyncio.run(measure(urls[name], options, short, long))
            turns.append({"round": index, "server": name, "seconds": seconds})
            rows.append([index, name, *(f"{value:.2f}" for value in seconds.values())])
    record = {"bench": "beside_long", "command": command_line(), "commit": commit(), "machine": machine()}
    emit({**record, "turns": turns}, options.out)
    print(table(["round", "server", "p50, s", "p90", "max", "long p50"], rows), file=sys.stderr)


if __name__ == "__main__":
    main()
