"""The cost of a grammar: steps with constrained rows and steps without, in turn, on the bare runner.

    python -m bench.grammar [--model-id model.gguf] [--streams 1,64] [--out bench/results/grammar.json]

Two sets of sequences with the same prompts decode alternately, one step each. One set is free; in the other
every second sequence (a single sequence, too) has a grammar. The grammars describe endless lists, so that no
sequence reaches their end. The ratio is the median of the ratios of neighbouring steps, so other programs'
activity matters little. A step is submitted when the previous one is finished, so the times include the
runner's hand-over. Unknown flags are settings of the project's server, as on its command line.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from bench.engine import Engine, Sequence, settings_of
from bench.report import command_line, emit, machine, median, numbers, table
from tgi_asgi.formats.sources import resolve
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepRow
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import SamplingParams

CONTEXT = 64  # prompt tokens
PREFILL = 16  # prompts per step
WARM_UP = 8  # untimed steps: a grammar's first masks build most of its automaton
PROMPT = "Fill in the form for each of the customers in this list, one after the other: "


def endless(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list of objects that does not end within a run."""
    item = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "array", "items": {**item, "additionalProperties": False}, "minItems": 10_000}


GRAMMARS = {
    "any JSON": sources.json_schema({"type": "array", "items": {"type": "object"}, "minItems": 10_000}),
    "records": sources.json_schema(
        endless(
            {
                "name": {"type": "string"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 99},
                "tags": {"type": "array", "items": {"type": "string"}},
                "is_ok": {"type": "boolean"},
            }
        )
    ),
    "bounded": sources.json_schema(
        endless(
            {
                "name": {"type": "string", "minLength": 1, "maxLength": 40},
                "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                "date": {"type": "string", "format": "date"},
                "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
            }
        )
    ),
    "regex": sources.regex(r"([A-Z][a-z]{2,8}, \d{4}-\d{2}-\d{2}\n)+"),
}


class Bench:
    """Measures one loaded model."""

    def __init__(self, model: LoadedModel) -> None:
        self._engine = Engine(model)
        compiler = GrammarCompiler(model.tokenizer, model.info.vocab_size)
        text = model.tokenizer.encode(PROMPT, add_special_tokens=False)
        self._prompt = (text * CONTEXT)[:CONTEXT]
        self._grammars = {name: compiler.compile(source) for name, source in GRAMMARS.items()}

    async def compare(self, streams: int, name: str, steps: int) -> dict[str, Any]:
        """Measure `steps` steps of free streams, and as many of streams of which half are constrained."""
        sequences = self._engine.sequences(2 * streams, CONTEXT, steps + WARM_UP)
        bound = range(streams, 2 * streams, 2)
        for first in range(0, len(sequences), PREFILL):
            await self._begin(sequences[first : first + PREFILL], bound, self._grammars[name])
        sets = {"free": sequences[:streams], "constrained": sequences[streams:]}
        times: dict[str, list[float]] = {kind: [] for kind in sets}
        for _ in range(WARM_UP + steps):
            for kind, members in sets.items():
                times[kind].append(await self._engine.decode(members, 1))
        free, constrained = (times[kind][WARM_UP:] for kind in sets)
        return {
            "streams": streams,
            "constrained": len(bound),
            "grammar": name,
            "free_ms": median((time_s * 1e3 for time_s in free), 3),
            "constrained_ms": median((time_s * 1e3 for time_s in constrained), 3),
            "ratio": median((b / f for f, b in zip(free, constrained, strict=True)), 3),
        }

    async def _begin(self, sequences: list[Sequence], bound: range, grammar: Grammar) -> None:
        """Compute the prompts of some sequences in one step."""
        starts = []
        for sequence in sequences:
            sequence.prompt, sequence.num_computed = self._prompt, CONTEXT
            own = grammar if sequence.slot in bound else None
            sampling = SamplingParams(temperature=1.0, seed=sequence.slot)
            starts.append(SlotStart(sequence.slot, sampling, 0, self._prompt, grammar=own))
        rows = [StepRow(each.slot, self._prompt, 0, each.tables, samples=True) for each in sequences]
        await self._engine.submit(rows, starts)


async def measure(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every row that the command line asks for."""
    return [
        await bench.compare(streams, name, max(options.steps // streams, options.least))
        for streams in options.streams
        for name in GRAMMARS
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=numbers(int), default=[1, 64], help="streams at a time: 1,64")
    parser.add_argument(
        "--steps", type=int, default=400, help="steps of each kind, divided by the number of streams"
    )
    parser.add_argument("--least", type=int, default=20, help="but at least these")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    settings = settings_of(arguments)
    files = resolve(settings)
    model = load(settings, files)
    try:
        rows = asyncio.run(measure(Bench(model), options))
    finally:
        model.runner.close()
    record = {"bench": "grammar", "command": command_line(), "machine": machine(), "dtype": model.info.dtype}
    emit({**record, "threads": model.info.num_threads, "rows": rows}, options.out)
    keys = ("streams", "constrained", "grammar", "free_ms", "constrained_ms", "ratio")
    print(table(keys, ([row[key] for key in keys] for row in rows)))


if __name__ == "__main__":
    main()
