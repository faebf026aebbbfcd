"""Host time of a step: planning, applying, delivering, without a model.

    python -m bench.scheduler --sequences 64 --steps 400

Prints one JSON object: CPU microseconds per step of the scheduler alone and of the whole engine with sinks
attached (tokens to text, stop strings, events, one call of a sink per request), of planning a step while a
long prompt that is cached waits for blocks, and nanoseconds per token of hashing a prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence

from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.policy import SchedulingPolicy
from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence as EngineSequence
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step_time import StepSize
from tgi_asgi.errors import TgiError
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.runner.plan import RunnerTraits, Sampled, StepPlan, StepResult
from tgi_asgi.settings import Settings
from tgi_asgi.types import GenerationRequest, SamplingParams, StopConditions, TokenEvent

BLOCK_SIZE = 16
VOCAB_SIZE = 50_000


class Words:
    """A byte table: every token is a short English word."""

    eos_ids = frozenset({0})
    special_ids = frozenset({0})

    def __init__(self) -> None:
        self._bytes = [b" word%d" % index for index in range(VOCAB_SIZE)]

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]


def make_traits(num_blocks: int, max_batch_size: int) -> RunnerTraits:
    """Return the traits of a runner of long steps."""
    return RunnerTraits(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_batch_size=max_batch_size,
        max_step_tokens=1 << 20,
        min_chunk=BLOCK_SIZE,
    )


class InstantRunner:
    """Samples token 1 everywhere, instantly."""

    def __init__(self, num_blocks: int, max_batch_size: int) -> None:
        self.traits = make_traits(num_blocks, max_batch_size)
        self.num_threads = 0
        self.progress: int | None = None
        self.num_decode_steps = 0
        self.begun_s = 0.0

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        if len(plan.rows) == self.traits.max_batch_size:
            self.num_decode_steps += 1
            if self.num_decode_steps == 1:
                self.begun_s = time.process_time()
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        future.set_result(sample_all(plan))
        return future

    def close(self) -> None: ...


class Counter:
    """A sink that does nothing."""

    def on_events(self, events: Sequence[TokenEvent]) -> None: ...

    def on_error(self, error: TgiError) -> None:
        raise error


def sample_all(plan: StepPlan) -> StepResult:
    """Return token 1 for every row that samples."""
    return StepResult(plan.step_id, [Sampled(1) if row.samples else None for row in plan.rows])


def make_request(index: int, prompt_len: int, max_tokens: int) -> GenerationRequest:
    prompt = [2 + (index * 31 + position) % (VOCAB_SIZE - 2) for position in range(prompt_len)]
    stop = StopConditions(max_tokens=max_tokens, stop=("\n\n", "User:"))
    return GenerationRequest(f"r{index}", prompt, SamplingParams(seed=index), stop)


def scheduler_us(num_sequences: int, num_steps: int, prompt_len: int) -> float:
    """Return the time of `plan` and `apply` for a decode step, one step ahead as the engine runs."""
    budget = TokenBudget(max_tokens=1 << 20, block_size=BLOCK_SIZE, target_s=1e9)
    blocks = num_sequences * -(-(prompt_len + num_steps + 4) // BLOCK_SIZE) + num_sequences
    scheduler = Scheduler(make_traits(blocks, num_sequences), SchedulingPolicy(), budget, EngineStats())
    for index in range(num_sequences):
        request = make_request(index, prompt_len, num_steps + 3)
        chain = HashChain(root_digest(None, None), BLOCK_SIZE)
        scheduler.add([EngineSequence(request, 0, arrival_s=0.0, number=index, chain=chain)])
    budget.observe(StepSize(0, 1), 0.0)
    ahead = scheduler.plan()
    spent_s = 0.0
    for _ in range(num_steps):
        begun = time.process_time()
        step = scheduler.plan()
        spent_s += time.process_time() - begun
        assert ahead is not None
        result = sample_all(ahead.plan)
        begun = time.process_time()
        scheduler.apply(ahead, result)
        spent_s += time.process_time() - begun
        ahead = step
    return spent_s / num_steps * 1e6


async def engine_us(num_sequences: int, num_steps: int, prompt_len: int) -> float:
    """Return the time of a decode step of a whole engine whose runner only creates results."""
    blocks = num_sequences * -(-(prompt_len + num_steps) // BLOCK_SIZE) + num_sequences
    runner = InstantRunner(blocks, num_sequences)
    info = ModelInfo("m", None, "M", "f", "cpu", VOCAB_SIZE, 1 << 20, 1 << 20, frozenset({0}))
    engine = Engine(runner, Words(), Settings(max_concurrent_requests=num_sequences), info)
    engine.start()
    for index in range(num_sequences):
        request = make_request(index, prompt_len, num_steps)
        engine.submit(request, engine.acquire(1)).attach(Counter())
    await engine.drain(600)
    await engine.stop()
    return (time.process_time() - runner.begun_s) / runner.num_decode_steps * 1e6


def blocked_us(num_streams: int, prompt_len: int = 128_000, num_steps: int = 200) -> float:
    """Return the time of planning a step in which a cached prompt waits for blocks beside streams.

    The first stream has the prompt, too, and the others fill a block in other steps, as they do in service:
    the waiting prompt is looked up again whenever the cache has changed.
    """
    num_blocks = prompt_len // BLOCK_SIZE + num_streams * 32 + 100
    budget = TokenBudget(max_tokens=512, block_size=BLOCK_SIZE, target_s=1e9)
    scheduler = Scheduler(make_traits(num_blocks, num_streams + 1), SchedulingPolicy(), budget, EngineStats())

    def add(number: int, seed: int, num_tokens: int) -> None:
        chain = HashChain(root_digest(None, None), BLOCK_SIZE)
        request = make_request(seed, num_tokens, 1 << 20)
        scheduler.add([EngineSequence(request, 0, arrival_s=0.0, number=number, chain=chain)])

    def step_s() -> float:
        begun = time.process_time()
        step = scheduler.plan()
        spent_s = time.process_time() - begun
        assert step is not None
        scheduler.apply(step, sample_all(step.plan))
        return spent_s

    budget.observe(StepSize(0, 1), 1e-6)
    add(0, 0, prompt_len)
    for number in range(1, num_streams + 1):
        while scheduler.num_waiting or any(each.is_prefilling for each in scheduler.running):
            step_s()
        if number < num_streams:
            add(number, number, 20 + 4 * number)
    add(num_streams, 0, prompt_len + (num_streams + 7) * 32 * BLOCK_SIZE)  # needs more blocks than are free
    step_s()
    spent_s = sum(step_s() for _ in range(num_steps))
    assert scheduler.num_waiting == 1
    return spent_s / num_steps * 1e6


def lookup_ns(prompt_len: int = 8192) -> float:
    """Return nanoseconds per token of hashing a prompt, which is nearly the whole cost of a first lookup."""
    tokens = list(range(prompt_len))
    best = min(
        timed(
            lambda: HashChain(root_digest(None, None), BLOCK_SIZE).digest(
                prompt_len // BLOCK_SIZE - 1, tokens
            )
        )
        for _ in range(20)
    )
    return best / prompt_len * 1e9


def timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=200, help="tokens in each prompt")
    args = parser.parse_args()
    size = (args.sequences, args.steps, args.prompt)
    report = {
        "sequences": args.sequences,
        "scheduler_us": round(scheduler_us(*size), 1),
        "engine_us": round(asyncio.run(engine_us(*size)), 1),
        "blocked_us": round(blocked_us(args.sequences), 1),
        "prefix_lookup_ns_per_token": round(lookup_ns(), 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
