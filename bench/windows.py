"""The cost of sliding windows: decode steps after short and long contexts, and blocks that streams hold.

    python -m bench.windows [--contexts 1024,16384] [--repeats 9] [--out bench/results/windows.json]

Models of random weights (Q8_0) in the shapes of published ones, whose layers have a window of 512: all of
them, or five of six. Steps of one stream after each context alternate. The contexts themselves are not
computed, because the time of a step does not depend on the cache's contents.

Then the engine's scheduler plans --streams of --tokens each, for a runner that takes no time: how many run
concurrently, how many blocks they hold at most, and how many are preempted, with a cache of --memory-tokens
per stream. Prints one JSON object and tables.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

from bench.report import command_line, commit, emit, machine, median, numbers, table
from bench.scheduler import make_request, sample_all
from bench.shapes import RandomWeights
from tgi_asgi import ops
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.policy import SchedulingPolicy
from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.runner.kv import CacheSizes, KvSize, groups_of
from tgi_asgi.runner.plan import RunnerTraits, SlotStart, StepPlan, StepRow
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.types import SamplingParams

BLOCK = 16
WINDOW = 512
STEPS = 8  # per measured time
GREEDY = SamplingParams(temperature=0.0)


def shapes() -> dict[str, ModelConfig]:
    """Return the models: Llama 3.2 1B's layers with windows in all of them, and Gemma 3 1B's."""
    llama = LayerSpec(RopeSpec(64, 500000.0), WINDOW, 64**-0.5)
    near = LayerSpec(RopeSpec(256, 10000.0), WINDOW, 256**-0.5)
    far = dataclasses.replace(near, rope=RopeSpec(256, 1e6), window=None)
    common: dict[str, Any] = {"context_length": 1 << 17, "norm_eps": 1e-6, "has_tied_embeddings": True}
    return {
        "16 layers, all with windows": ModelConfig(
            architecture="MistralForCausalLM", vocab_size=49152, hidden_size=2048, intermediate_size=8192,
            num_heads=32, num_kv_heads=8, head_dim=64, layers=(llama,) * 16, **common,
        ),
        "26 layers, 22 with windows": ModelConfig(
            architecture="Gemma3ForCausalLM", vocab_size=49152, hidden_size=1152, intermediate_size=6912,
            num_heads=4, num_kv_heads=1, head_dim=256,
            layers=tuple(far if layer % 6 == 5 else near for layer in range(26)), **common,
        ),
    }  # fmt: skip


class Stream:
    """A stream with its own blocks, after a context that was not computed."""

    def __init__(self, runner: HostRunner, slot: int, context: int, first_block: int) -> None:
        self._runner, self._slot, self._context = runner, slot, context
        num_steps = 64 * STEPS
        needs = BlockNeeds(runner.traits.windows, BLOCK, num_steps)
        self._tables = []
        self.end_block = first_block
        for group in range(len(runner.traits.windows)):
            first, end = needs.first_read(group, context), -(-(context + num_steps) // BLOCK)
            self._tables.append([-1] * first + list(range(self.end_block, self.end_block + end - first)))
            self.end_block += end - first

    async def time(self) -> float:
        """Return the seconds per step, measured over several steps, two in flight."""
        start = SlotStart(self._slot, GREEDY, 0, (5,) * 9)
        await self._runner.submit(StepPlan(0, [self._row(0, [5])], [start]))
        begun_s = time.perf_counter()
        pending = self._runner.submit(StepPlan(1, [self._row(1)]))
        for at in range(2, STEPS + 1):
            following = self._runner.submit(StepPlan(at, [self._row(at)]))
            await pending
            pending = following
        await pending
        return (time.perf_counter() - begun_s) / STEPS

    def _row(self, at: int, ids: list[int] | None = None) -> StepRow:
        return StepRow(self._slot, ids, self._context + at, self._tables, samples=True)


async def time_steps(config: ModelConfig, contexts: list[int], repeats: int) -> list[float]:
    """Return the median milliseconds of a step after each context, in turns."""
    longest = max(contexts) + 64 * STEPS
    model = Decoder(config, RandomWeights("q8_0"), ops.Packing(False), longest)
    groups = groups_of(config, "bfloat16")
    num_blocks = len(contexts) * len(groups.windows) * -(-longest // BLOCK)
    needs = BlockNeeds(groups.windows, BLOCK, max_step_tokens=64)
    size = KvSize(num_blocks, needs, groups.bytes_per_token, "bfloat16")
    count = len(contexts)
    limits = ops.StepLimits(max_tokens=64, max_sequences=count, max_rows=count, max_context=longest)
    runner = HostRunner(model, CacheSizes(size), limits)
    assert isinstance(runner._kv_pool, ops.KvPool)
    runner._kv_pool.native.memory()[:] = 12  # small as bfloat16; memory that was never written is slower
    streams: list[Stream] = []
    for slot, context in enumerate(contexts):
        streams.append(Stream(runner, slot, context, streams[-1].end_block if streams else 0))
    times: list[list[float]] = [[] for _ in contexts]
    for _ in range(repeats + 1):  # the first is not counted
        for found, stream in zip(times, streams, strict=True):
            found.append(await stream.time() * 1e3)
    runner.close()
    return [median(found[1:], 3) for found in times]


def plan_streams(config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Plan streams until they end; return what they held."""
    groups = groups_of(config, "bfloat16")
    num_groups, chunk = len(groups.windows), options.chunk
    stats = EngineStats()
    num_blocks = options.streams * options.memory_tokens // BLOCK * num_groups
    traits = RunnerTraits(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_batch_size=options.streams,
        max_step_tokens=chunk + options.streams,
        windows=groups.windows,
    )
    budget = TokenBudget(max_tokens=chunk, block_size=BLOCK, target_s=1e9)
    scheduler = Scheduler(traits, SchedulingPolicy(), budget, stats)
    sequences = []
    for index in range(options.streams):
        request = make_request(index, options.tokens - options.answer, options.answer)
        chain = HashChain(root_digest(None, None), BLOCK)
        sequences.append(Sequence(request, 0, arrival_s=0.0, number=index, chain=chain))
        scheduler.add([sequences[-1]])
    most_running, most_used = 0, 0
    most_held = [0] * num_groups
    flights: list[Step] = []
    while flights or scheduler.num_running or scheduler.num_waiting:
        while len(flights) < 2 and (step := scheduler.plan()) is not None:
            flights.append(step)
        most_running = max(most_running, scheduler.num_running)
        most_used = max(most_used, scheduler.pool.num_used)
        for sequence in scheduler.running:
            for group, (entries, given_back) in enumerate(
                zip(sequence.tables, sequence.num_freed, strict=True)
            ):
                most_held[group] = max(most_held[group], len(entries) - given_back)
        step = flights.pop(0)
        for _, sequence in scheduler.apply(step, sample_all(step.plan)):
            if sequence.num_output >= sequence.max_tokens:
                scheduler.remove(sequence)
    return {
        "windows": groups.windows,
        "pool_blocks": num_blocks,
        "most_running": most_running,
        "most_used": most_used,
        "most_held_tokens": [count * BLOCK for count in most_held],
        "preemptions": stats.preemptions,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--contexts", type=numbers(int), default=[1024, 16384])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384, help="of a stream, prompt and answer")
    parser.add_argument("--answer", type=int, default=4096)
    parser.add_argument("--memory-tokens", type=int, default=1536, help="of a stream that keeps all")
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens a step")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    rows = []
    for name, config in shapes().items():
        times = asyncio.run(time_steps(config, options.contexts, options.repeats))
        held = plan_streams(config, options)
        rows.append({"shape": name, "step_ms": dict(zip(options.contexts, times, strict=True)), **held})
    record = {"bench": "windows", "command": command_line(), "commit": commit(), "machine": machine()}
    emit({**record, "window": WINDOW, "rows": rows}, options.out)
    times_of = [list(row["step_ms"].values()) for row in rows]
    head = ["shape", *[f"ms at {context}" for context in options.contexts], "last to first"]
    print(
        table(
            head,
            ([row["shape"], *found, found[-1] / found[0]] for row, found in zip(rows, times_of, strict=True)),
        )
    )
    keys = ("shape", "pool_blocks", "most_used", "most_running", "preemptions", "most_held_tokens")
    print(table(keys, ([row[key] for key in keys] for row in rows)))


if __name__ == "__main__":
    main()
