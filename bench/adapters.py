"""The cost of LoRA adapters: decoding without, with one, and with eight different ones in a batch of eight.

    python -m bench.adapters --model-id 1b-q8_0.gguf [--rank 16] [--rounds 7] [--llama-programs DIR]

Writes adapters of random values on all products for the model. Rounds are interleaved, a few steps of each
kind in turn. Prints each kind's median, the median of its ratio to the same batch without adapters, and the
interquartile range of that ratio. If llama.cpp's programs are given, its server gets the same adapters
through its API.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.adapter_files import write_adapter, write_gguf
from bench.engine import CHUNK, Engine, settings_of
from bench.llama_adapters import measure_llama
from bench.report import command_line, emit, machine, percentile, table
from tgi_asgi.formats.sources import resolve
from tgi_asgi.runner.load import load

_PROMPT = 16


class Kind:
    """A batch: the number of sequences, and the adapter of each (None: none)."""

    def __init__(self, name: str, base: str, which: list[int | None]) -> None:
        self.name, self.base, self.which = name, base, which
        self.times: list[float] = []  # of a step, round by round


def kinds() -> list[Kind]:
    """Return the kinds to measure; each kind is compared with its base."""
    return [
        Kind("x1, none", "x1, none", [None]),
        Kind("x1, one adapter", "x1, none", [0]),
        Kind("x8, none", "x8, none", [None] * 8),
        Kind("x8, all the same", "x8, none", [0] * 8),
        Kind("x8, four of none, four different", "x8, none", [None] * 4 + [0, 1, 2, 3]),
        Kind("x8, eight different", "x8, none", list(range(8))),
    ]


async def measure(engine: Engine, weights: list[Any], rounds: int, steps: int) -> list[Kind]:
    """Decode with each kind in turn, repeatedly."""
    found = kinds()
    for turn in range(rounds + 1):
        for kind in found:
            sequences = engine.sequences(len(kind.which), _PROMPT, steps + 4)
            for sequence, which in zip(sequences, kind.which, strict=True):
                sequence.adapter = None if which is None else weights[which]
            await engine.prefill(sequences, CHUNK)
            await engine.decode(sequences, 4)
            taken_s = await engine.decode(sequences, steps) / steps
            if turn:  # the first round warms up
                kind.times.append(taken_s)
    return found


def rows_of(found: list[Kind]) -> list[dict[str, Any]]:
    """Return a row per kind: the median step, and its ratio to the base's step of the same round."""
    by_name = {kind.name: kind for kind in found}
    rows = []
    for kind in found:
        ratios = [one / other for one, other in zip(kind.times, by_name[kind.base].times, strict=True)]
        rows.append(
            {
                "what": kind.name,
                "step_ms": round(percentile(kind.times, 0.5) * 1e3, 2),
                "tokens_per_s": round(len(kind.which) / percentile(kind.times, 0.5), 1),
                "ratio": round(percentile(ratios, 0.5), 3),
                "spread": [round(percentile(ratios, part), 3) for part in (0.25, 0.75)],
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a turn")
    parser.add_argument("--llama-programs", type=Path, help="folder of llama-server")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    settings = settings_of([*arguments, "--enable-lora", "true"])
    files = resolve(settings)
    model = load(settings, files)
    assert model.adapters is not None
    targets = {name: target.shape for name, target in model.adapters.layout.targets.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(seed)) for seed in range(8)]
        for seed, folder in enumerate(folders):
            write_adapter(folder, targets, options.rank, np.random.default_rng(seed))
        loaded = [model.adapters.load(folder) for folder in folders]
        try:
            weights = [each.weights for each in loaded]
            rows = rows_of(asyncio.run(measure(Engine(model), weights, options.rounds, options.steps)))
        finally:
            model.runner.close()
        megabytes = round(loaded[0].num_bytes / 1e6, 1)
        record = {"bench": "adapters", "command": command_line(), "machine": machine(), "rank": options.rank}
        record |= {"threads": model.info.num_threads, "megabytes": megabytes, "rows": rows}
        if options.llama_programs is not None:
            for folder in folders:
                write_gguf(folder)
            record["llama"] = measure_llama(
                options.llama_programs, files.path, folders, model.info.num_threads, options.rounds
            )
    emit(record, options.out)
    print(f"an adapter has {megabytes} MB")
    keys = ("what", "step_ms", "tokens_per_s", "ratio", "spread")
    print(
        table(
            ("what", "ms a step", "tok/s", "of none", "middle half"),
            ([row[key] for key in keys] for row in rows),
        )
    )
    for row in record.get("llama", ()):
        print(f"llama-server: {row}")


if __name__ == "__main__":
    main()
