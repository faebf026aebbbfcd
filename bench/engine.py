"""The bare engine: the runner driven as the engine drives it, two steps in flight, without HTTP or text.

    python -m bench.engine [--model-id model.gguf] [--dtype float32] [--prefill 512,2048] [--decode 1,4,16,64]

Prefill processes one prompt in one step; decode processes many sequences after a prompt of --context tokens,
and one sequence after --depth. Prints one JSON object and a table: tokens/s, the bytes that a step must read
(weights once, each sequence's KV) over its time, and their share of the bandwidth measured before. Unknown
flags are settings of the project's server, as on its command line.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bandwidth import read_bandwidth
from bench.report import command_line, emit, machine, median, numbers, table
from tgi_asgi.formats.sources import resolve
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.settings import DEMO_MODEL, Settings
from tgi_asgi.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
CHUNK = 2048  # prompt tokens per step during the untimed set-up of sequences


@dataclass(slots=True)
class Sequence:
    """One sequence: a random prompt, its slot, and all of its blocks for each group of layers."""

    slot: int
    prompt: list[int]
    tables: list[list[int]]
    num_computed: int = 0
    adapter: Any = None  # the adapter's weights


class Engine:
    """Drives a loaded model's runner by hand.

    Raises:
        SystemExit: if the KV cache is too small for the request.
    """

    def __init__(self, model: LoadedModel, seed: int = 0, sampling: SamplingParams = GREEDY) -> None:
        self.sampling = sampling
        self._runner, self._vocab = model.runner, model.info.vocab_size
        self._random = random.Random(seed)
        self._step_id = 0

    def sequences(self, count: int, prompt_tokens: int, output_tokens: int) -> list[Sequence]:
        """Make sequences of random tokens, each in its own blocks."""
        traits = self._runner.traits
        size = -(-(prompt_tokens + output_tokens) // traits.block_size)
        num_groups = len(traits.windows)
        if count * size * num_groups > traits.num_blocks or count > traits.max_batch_size:
            raise SystemExit(f"{count} sequences of {prompt_tokens + output_tokens} tokens do not fit")
        return [
            Sequence(
                slot,
                [self._random.randrange(self._vocab) for _ in range(prompt_tokens)],
                [
                    list(range(at * size, (at + 1) * size))
                    for at in range(slot * num_groups, (slot + 1) * num_groups)
                ],
            )
            for slot in range(count)
        ]

    async def prefill(self, sequences: list[Sequence], chunk: int) -> float:
        """Compute all prompts, `chunk` tokens of one sequence per step; return the seconds taken."""
        start_s = time.perf_counter()
        for sequence in sequences:
            starts = [SlotStart(sequence.slot, self.sampling, 0, sequence.prompt)]
            for first in range(0, len(sequence.prompt), chunk):
                ids = sequence.prompt[first : first + chunk]
                is_last = first + len(ids) == len(sequence.prompt)
                row = StepRow(
                    sequence.slot, ids, first, sequence.tables, samples=is_last, adapter=sequence.adapter
                )
                await self.submit([row], starts)
                starts = []
            sequence.num_computed = len(sequence.prompt)
        return time.perf_counter() - start_s

    async def decode(self, sequences: list[Sequence], steps: int) -> float:
        """Generate `steps` tokens of every sequence; return the seconds taken."""
        start_s = time.perf_counter()
        pending = self._decode_step(sequences)
        for _ in range(steps - 1):
            following = self._decode_step(sequences)
            await pending
            pending = following
        await pending
        return time.perf_counter() - start_s

    def _decode_step(self, sequences: list[Sequence]) -> asyncio.Future[StepResult]:
        return self.submit(self.decode_rows(sequences), [])

    def decode_rows(self, sequences: list[Sequence]) -> list[StepRow]:
        """Return rows that sample one token per sequence, which the next step then computes."""
        rows = [
            StepRow(
                s.slot, None, s.num_computed, s.tables, samples=True, is_generated=True, adapter=s.adapter
            )
            for s in sequences
        ]
        for sequence in sequences:
            sequence.num_computed += 1
        return rows

    def submit(self, rows: list[StepRow], starts: list[SlotStart]) -> asyncio.Future[StepResult]:
        """Hand a step to the runner."""
        self._step_id += 1
        return self._runner.submit(StepPlan(self._step_id, rows, starts))


class Bench:
    """Measures one loaded model; every row contains the bandwidth measured just before it."""

    def __init__(self, model: LoadedModel, weight_bytes: int, repeats: int) -> None:
        self._engine = Engine(model)
        self._weight_bytes = weight_bytes
        self._kv_bytes = model.info.kv_bytes / model.info.kv_tokens
        self._max_chunk = model.runner.traits.max_step_tokens
        self._repeats = repeats

    async def prefill(self, tokens: int) -> dict[str, Any]:
        """Measure one prompt."""
        gb_per_s = read_bandwidth()
        times = []
        for _ in range(self._repeats + 1):
            sequences = self._engine.sequences(1, tokens, 0)
            times.append(await self._engine.prefill(sequences, min(tokens, self._max_chunk)))
        rate = tokens / median(times[1:], 6)
        return {"what": f"prefill {tokens}", "tokens_per_s": round(rate, 1), "read_gb_per_s": gb_per_s}

    async def decode(self, count: int, context: int, steps: int, name: str) -> dict[str, Any]:
        """Measure `count` concurrent sequences: `steps` tokens each after `context` tokens, every time."""
        gb_per_s = read_bandwidth()
        sequences = self._engine.sequences(count, context, steps)
        await self._engine.prefill(sequences, min(CHUNK, self._max_chunk))
        times = []
        for _ in range(self._repeats + 1):
            for sequence in sequences:
                sequence.num_computed = context
            times.append(await self._engine.decode(sequences, steps) / steps)
        step_s = median(times[1:], 7)
        mean_context = context + steps / 2
        step_bytes = self._weight_bytes + count * mean_context * self._kv_bytes
        return {
            "what": name,
            "tokens_per_s": round(count / step_s, 1),
            "step_ms": round(step_s * 1e3, 3),
            "step_gb_per_s": round(step_bytes / step_s / 1e9, 1),
            "read_gb_per_s": gb_per_s,
            "share_of_bandwidth": round(step_bytes / step_s / 1e9 / gb_per_s, 3),
        }


async def measure(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every row that the command line asks for."""
    rows = [await bench.prefill(tokens) for tokens in options.prefill]
    for count in options.decode:
        rows.append(await bench.decode(count, options.context, options.tokens, f"decode x{count}"))
    for depth in options.depth:
        rows.append(await bench.decode(1, depth, options.tokens, f"decode at {depth}"))
    return rows


def settings_of(arguments: list[str]) -> Settings:
    """Convert `--name value` pairs to settings, as the server's command line does."""
    if len(arguments) % 2 or any(not name.startswith("--") for name in arguments[::2]):
        raise SystemExit(f"settings come as pairs, --name value: {' '.join(arguments)}")
    environ = {
        name[2:].replace("-", "_").upper(): value
        for name, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    return Settings.from_environ({"MODEL_ID": DEMO_MODEL, "MAX_BATCH_TOTAL_TOKENS": "24576", **environ})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prefill", type=numbers(int), default=[512, 2048], help="prompt lengths: 512,2048")
    parser.add_argument("--decode", type=numbers(int), default=[1, 4, 16, 64], help="sequences: 1,4,16,64")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens before decoding")
    parser.add_argument("--depth", type=numbers(int), default=[4000], help="long contexts, one sequence")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    settings = settings_of(arguments)
    files = resolve(settings)
    with OpenModel(files) as opened:
        weight_bytes = opened.weights.num_bytes
    model = load(settings, files)
    try:
        rows = asyncio.run(measure(Bench(model, weight_bytes, options.repeats), options))
    finally:
        model.runner.close()
    record = {"bench": "engine", "command": command_line(), "machine": machine(), "dtype": model.info.dtype}
    emit({**record, "threads": model.info.num_threads, "rows": rows}, options.out)
    head = ("what", "tok/s", "ms a step", "GB/s in the step", "GB/s of the machine", "share")
    keys = ("what", "tokens_per_s", "step_ms", "step_gb_per_s", "read_gb_per_s", "share_of_bandwidth")
    print(table(head, ([row.get(key) for key in keys] for row in rows)))


if __name__ == "__main__":
    main()
