"""Prompts that arrive together compute their common prefix once, even if steps fail."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import ask, make_request
from tests.support.fake_runner import FakeRunner, expected_tokens
from tests.support.waiting import until
from tgi_asgi.runner.plan import StepPlan
from tgi_asgi.types import GenerationRequest, SamplingParams

SEEDED = SamplingParams(seed=5)


def make_burst(num_prompts: int, num_shared: int, num_own: int) -> list[GenerationRequest]:
    shared = [index * 5 % 256 for index in range(num_shared)]
    return [make_request([*shared, *([index] * num_own)], 8, sampling=SEEDED) for index in range(num_prompts)]


async def test_a_cold_burst_computes_its_common_prefix_once(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(num_blocks=400))
    requests = make_burst(32, 1024, 21)
    answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens() == expected_tokens(request.prompt_ids, 8, sampling=SEEDED)
    assert engine.stats.prefill_tokens <= 1.05 * (1024 + 32 * 21)
    assert engine.stats.prefix_query_tokens == 32 * 1045
    assert engine.stats.prefix_hit_tokens == 31 * 1024
    assert sorted(answer.stats.cached_tokens for answer in answers) == [0] + [1024] * 31


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
async def test_a_burst_whose_steps_fail_at_random_loses_nobody(
    make_engine: MakeEngine, error: type[Exception]
) -> None:
    rng = random.Random(4)
    runner = FakeRunner(num_blocks=400)
    runner.fault = lambda plan: error() if len(plan.rows) > 1 and rng.random() < 0.3 else None
    engine = make_engine(runner, max_batch_prefill_tokens=256)
    requests = make_burst(24, 200, 21)
    answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens() == expected_tokens(request.prompt_ids, 8, sampling=SEEDED)
    assert engine.stats.failed_steps > 5
    assert engine.stats.prefix_query_tokens == 24 * 221, "each prompt must count once"


async def test_a_prompt_that_fails_takes_none_with_it_that_share_its_beginning(
    make_engine: MakeEngine,
) -> None:
    """The failing prompt computes the common prefix, and the others wait for it in the same step."""
    runner = FakeRunner(num_blocks=400)
    requests = make_burst(8, 100, 21)
    ill = requests[0].prompt_ids

    slots: dict[int, bool] = {}

    def fault(plan: StepPlan) -> BaseException | None:
        for start in plan.starts:
            slots[start.slot] = start.prompt_ids == ill
        return RuntimeError("ill") if any(slots[row.slot] for row in plan.rows) else None

    runner.fault = fault
    engine = make_engine(runner)
    failed, *answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    assert failed.error is not None
    for request, answer in zip(requests[1:], answers, strict=True):
        assert answer.tokens() == expected_tokens(request.prompt_ids, 8, sampling=SEEDED)


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
async def test_choices_of_a_prompt_that_is_tried_again_in_parts_are_right(
    make_engine: MakeEngine, prompt_logprobs: int | None, error: type[Exception]
) -> None:
    """The cached blocks must be right too: the prompt is sent again afterwards."""
    runner = FakeRunner(num_blocks=200, max_step_tokens=64)
    faults = [error()]

    def fault(plan: StepPlan) -> BaseException | None:
        last = plan.rows[-1]
        return faults.pop() if faults and last.samples and last.num_tokens > 1 else None

    engine = make_engine(runner, max_batch_prefill_tokens=48)
    if error is RuntimeError:  # it fails a request whose row is alone in a step
        company = asyncio.create_task(ask(engine, make_request([7] * 5, 40)))
        await until(lambda: engine.stats.sampled_tokens > 0)
    runner.fault = fault
    prompt = list(range(100, 240))
    request = make_request(prompt, 20, sampling=SEEDED, n=4, prompt_logprobs=prompt_logprobs)
    answer = await ask(engine, request)
    for choice in range(4):
        assert answer.tokens(choice) == expected_tokens(prompt, 20, sampling=SEEDED, choice=choice)
    assert engine.stats.failed_steps == 1
    more = [*prompt, *answer.tokens(2)]
    again = await ask(engine, make_request(more, 10, sampling=SEEDED))
    assert again.tokens() == expected_tokens(more, 10, sampling=SEEDED)
    if error is RuntimeError:
        assert (await company).error is None
