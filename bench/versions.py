"""Compare two versions of the engine: every row of `bench.engine` in short alternating turns, as ratios.

    git worktree add ../before HEAD~20 && (cd ../before && python setup.py build_ext --inplace)
    python -m bench.versions ../before [--turns 24] [--rows "decode x4"] [--model-id model.gguf]

A shared machine's bandwidth changes by half within minutes, so two consecutive runs cannot show a difference
of two per cent. Here each version runs in its own process and waits while the other computes a few steps.
Turns go A B B A, and a ratio is that of two neighbours: above 1, this tree is faster. Unknown flags are
settings, as in `bench.engine`, whose `Engine` both trees must have.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A row's sequences, tokens before the clock starts, and steps timed; 0 steps: the prompt itself is timed.
ROWS = {
    "prefill 512": (1, 512, 0),
    "prefill 2048": (1, 2048, 0),
    "decode x1": (1, 128, 32),
    "decode x4": (4, 128, 32),
    "decode x16": (16, 128, 16),
    "decode x64": (64, 128, 8),
    "decode at 4000": (1, 4000, 32),
}


def work(arguments: list[str]) -> None:
    """For each row name on standard input, print the seconds that the row took, with the tree on the path."""
    from bench.engine import CHUNK, Engine, settings_of
    from tgi_asgi.formats.sources import resolve
    from tgi_asgi.runner.load import load

    settings = settings_of(arguments)
    model = load(
        settings, resolve(settings, lambda stage, done, total: None), lambda stage, done, total: None
    )
    engine = Engine(model)

    async def turn(name: str, prepared: dict[str, Any]) -> float:
        count, context, steps = ROWS[name]
        if not steps:
            chunk = min(context, settings.max_batch_prefill_tokens)
            return await engine.prefill(engine.sequences(1, context, 0), chunk)
        if name not in prepared:
            prepared.clear()  # slots and blocks belong to one row at a time
            prepared[name] = engine.sequences(count, context, steps)
            await engine.prefill(prepared[name], CHUNK)
        for sequence in prepared[name]:
            sequence.num_computed = context
        return await engine.decode(prepared[name], steps)

    async def serve() -> None:
        prepared: dict[str, Any] = {}
        print("ready", flush=True)
        for line in sys.stdin:
            print(await turn(line.strip(), prepared), flush=True)

    asyncio.run(serve())
    model.runner.close()


class Version:
    """A tree's engine in a separate process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.answer()

    def answer(self) -> str:
        """Read a line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"a version ended with {self._process.wait()}")
        return line

    def seconds(self, row: str) -> float:
        """Compute one turn of a row."""
        assert self._process.stdin is not None
        print(row, file=self._process.stdin, flush=True)
        return float(self.answer())


@contextmanager
def version(tree: Path, arguments: list[str]) -> Iterator[Version]:
    """Start a tree's engine; it ends when its input is closed."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", *arguments]
    environ, pipe = {**os.environ, "PYTHONPATH": str(tree)}, subprocess.PIPE
    with subprocess.Popen(command, cwd=tree, env=environ, text=True, stdin=pipe, stdout=pipe) as process:
        yield Version(process)  # leaving closes its input


def compare(here: Version, there: Version, row: str, turns: int) -> dict[str, Any]:
    """Measure a row in turns; the first pair warms up."""
    from bench.report import median, percentile

    pairs = []
    for index in range(turns + 1):
        order = (here, there) if index % 2 else (there, here)
        seconds = {id(each): each.seconds(row) for each in order}
        pairs.append((seconds[id(here)], seconds[id(there)]))
    ratios = [other / own for own, other in pairs[1:]]
    tokens = ROWS[row][0] * (ROWS[row][2] or ROWS[row][1])
    return {
        "what": row,
        "tokens_per_s": median((tokens / own for own, _ in pairs[1:]), 1),
        "other_tokens_per_s": median((tokens / other for _, other in pairs[1:]), 1),
        "ratio": median(ratios, 3),
        "ratio_p25": round(percentile(ratios, 0.25), 3),
        "ratio_p75": round(percentile(ratios, 0.75), 3),
        "turns": turns,
    }


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2:])
        return
    from bench.report import command_line, commit, emit, machine, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("other", type=Path, help="the other tree, built in place")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--turns", type=int, default=24, help="of each row and version")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    other = options.other.resolve()
    with version(ROOT, arguments) as here, version(other, arguments) as there:
        rows = [compare(here, there, row, options.turns) for row in options.rows]
    commits = {name: commit(tree) for name, tree in (("commit", ROOT), ("other_commit", other))}
    record = {"bench": "versions", "command": command_line(), **commits, "machine": machine(), "rows": rows}
    emit(record, options.out)
    keys = ("what", "tokens_per_s", "other_tokens_per_s", "ratio", "ratio_p25", "ratio_p75")
    print(
        table(("what", "tok/s", "of the other", "ratio", "p25", "p75"), ([r[k] for k in keys] for r in rows))
    )


if __name__ == "__main__":
    main()
