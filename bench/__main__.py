"""Measure this server on its own in five minutes: `make bench`, or `python -m bench [--model-id model.gguf]`.

Runs the programs of this folder one after another, each in its own process, and prints their tables, then a
summary. Writes all JSON objects to --out and the latency distributions next to it. Other flags are settings
of the server.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import RESULTS, save, table
from bench.servers import ROOT
from tgi_asgi.settings import DEMO_MODEL

TIMEOUT_S = 180


def programs(out: Path, model_id: str, settings: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the programs to run, with their flags."""
    model = ["--model-id", model_id]
    picture = ["--picture", str(out.with_suffix(".svg"))]
    return [
        ("bandwidth", []),
        ("kernels", model),
        ("scheduler", []),
        ("engine", [*model, *settings]),
        ("serve", ["--clients", "1,16,64", "--rates", "4", *picture, *model, *settings]),
        ("startup", ["--runs", "3", *model, *settings]),
        ("memory", [*model, *settings]),
    ]


def run(name: str, flags: Sequence[str]) -> dict[str, Any]:
    """Run a program, print its output except its JSON object, and return that object.

    Raises:
        SystemExit: if the program fails, or takes longer than `TIMEOUT_S`.
    """
    start_s = time.perf_counter()
    command = [sys.executable, "-m", f"bench.{name}", *flags]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = program.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        program.send_signal(signal.SIGINT)  # lets it stop the server that it started
        program.communicate()
        raise SystemExit(f"bench.{name} took more than {TIMEOUT_S} s") from None
    if program.returncode:
        raise SystemExit(f"bench.{name} failed")
    record: dict[str, Any] = {}
    print(f"\n## {name} ({time.perf_counter() - start_s:.0f} s)", flush=True)
    for line in output.splitlines():
        if line.startswith("{"):
            record = json.loads(line)
        else:
            print(line, flush=True)
    return record


def summary(found: dict[str, dict[str, Any]]) -> list[tuple[str, Any]]:
    """Return the most important figures."""
    engine = {row["what"]: row for row in found["engine"]["rows"]}
    served = {load["load"]: load for load in found["serve"]["loads"]}
    rows: list[tuple[str, Any]] = [(f"{what}, tokens/s", row["tokens_per_s"]) for what, row in engine.items()]
    rows += [
        (f"{what}, share of the bandwidth", row["share_of_bandwidth"])
        for what, row in engine.items()
        if what in ("decode x1", "decode at 4000")
    ]
    rows += [(f"served, {name}, tokens/s", load["tokens_per_s"]) for name, load in served.items()]
    rows += [(f"served, {name}, TTFT p50, ms", load["ttft_ms"]["p50"]) for name, load in served.items()]
    rows += [(f"served, {name}, ITL p99, ms", load["itl_ms"]["p99"]) for name, load in served.items()]
    one = served["1 client"]["tokens_per_s"] / engine["decode x1"]["tokens_per_s"]
    rows.append(("served over bare, 1 sequence", round(one, 3)))
    rows.append(("exec to first token, s", found["startup"]["seconds_from_exec"]["first token"]))
    rows.append(("resident memory, 8k KV tokens written, MiB", found["memory"]["used"]["rss_mib"]))
    return rows


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "ours.json", help="where the JSON objects go")
    parser.add_argument("--model-id", default=DEMO_MODEL)
    options, settings = parser.parse_known_args()
    found = {
        name: run(name, flags) for name, flags in programs(options.out.absolute(), options.model_id, settings)
    }
    rows = summary(found)
    save({"summary": dict(rows), **found}, options.out)
    print("\n## summary\n" + table(("figure", "value"), rows))


if __name__ == "__main__":
    main()
