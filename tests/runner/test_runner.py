"""The runner on a tiny model: what a plan does, what a step leaves behind, and how it fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.checkpoints import load_model, make_model, reference_logits, save
from tests.support.runner_driver import GREEDY, Job, generate, sample_over_a_shared_block
from tgi_asgi import ops
from tgi_asgi.engine.reasoning import force
from tgi_asgi.models.family import Model
from tgi_asgi.runner.inputs import PlanError
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.types import SamplingParams

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28]  # more than a block
NAN_TOKEN = 7
SEEDED = SamplingParams(temperature=1.0, seed=11)


@pytest.fixture(scope="module", autouse=True)
def threads() -> None:
    ops.configure_threads(2, nice=0, pin=False)


@pytest.fixture(scope="module", params=[32, 16], ids=["whole strips", "half strips"])
def heads(request: pytest.FixtureRequest) -> dict[str, int]:
    """Return heads of as many dims as the kernels compute at a time, or of fewer."""
    return {"num_attention_heads": 64 // request.param, "num_key_value_heads": 32 // request.param}


@pytest.fixture(scope="module")
def reference(heads: dict[str, int]) -> PreTrainedModel:
    return make_model(**heads)


@pytest.fixture(scope="module")
def model(reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(reference, tmp_path_factory.mktemp("model")), max_positions=256)


def start(slot: int, sampling: SamplingParams = GREEDY, **changes: object) -> SlotStart:
    return SlotStart(slot, sampling, 0, PROMPT, **changes)  # type: ignore[arg-type]


def greedy_reference(model: torch.nn.Module, num_tokens: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(num_tokens):
        ids.append(int(reference_logits(model, ids)[-1].argmax()))  # type: ignore[arg-type]
    return ids[len(PROMPT) :]


async def test_greedy_tokens_are_the_reference_s(runner: HostRunner, reference: torch.nn.Module) -> None:
    job = Job(PROMPT, 12)
    await generate(runner, [job])
    assert job.token_ids == greedy_reference(reference, 12)


async def test_a_token_left_on_the_device_equals_one_that_is_given(runner: HostRunner) -> None:
    job = Job(PROMPT, 3)
    await generate(runner, [job])
    first, second = job.token_ids[:2]
    blocks, at = [1, 2], len(PROMPT)
    rows = [StepRow(0, PROMPT, 0, [blocks], samples=True)]
    await runner.submit(StepPlan(0, rows, [start(0)]))
    await runner.submit(StepPlan(1, [StepRow(0, [first], at, [blocks], samples=True)]))
    result = await runner.submit(StepPlan(2, [StepRow(0, [second], at + 1, [blocks], samples=True)]))
    assert result.sampled[0] is not None
    assert result.sampled[0].token_id == job.token_ids[2]


@pytest.mark.parametrize("chunk", [1, 5, 16, 17])
async def test_chunks_do_not_change_the_tokens(runner: HostRunner, chunk: int) -> None:
    whole, cut = Job(PROMPT, 8, SEEDED), Job(PROMPT, 8, SEEDED)
    await generate(runner, [whole])
    await generate(runner, [cut], chunk=chunk)
    assert cut.token_ids == whole.token_ids


async def test_a_copied_block_serves_a_fork(runner: HostRunner) -> None:
    job = Job(PROMPT, 2)
    await generate(runner, [job])
    rows = [StepRow(0, PROMPT, 0, [[1, 2]], samples=True)]
    await runner.submit(StepPlan(0, rows, [start(0)]))
    fork = StepRow(1, [job.token_ids[0]], len(PROMPT), [[1, 5]], samples=True)
    result = await runner.submit(StepPlan(1, [fork], [start(1)], copies=[(2, 5)]))
    assert result.sampled[0] is not None
    assert result.sampled[0].token_id == job.token_ids[1]


async def test_a_row_may_read_what_another_of_its_step_writes(runner: HostRunner) -> None:
    """Plan prompts that share a block together: one row computes it, the other has it in its block table."""
    steps = await sample_over_a_shared_block(runner, PROMPT, SEEDED)
    job = Job(PROMPT, 4, SEEDED)
    await generate(runner, [job])
    for row in (0, 1):
        sampled = [step[row] for step in steps]
        assert [each and each.token_id for each in sampled] == job.token_ids


async def test_a_resumed_sequence_goes_on_as_if_never_stopped(runner: HostRunner) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.5)
    job = Job(PROMPT, 10, sampling)
    await generate(runner, [job])
    done = job.token_ids[:6]
    row = StepRow(3, PROMPT + done, 0, [[10, 11]], samples=True)
    plan = StepPlan(0, [row], [start(3, sampling, output_ids=done)])
    tokens = []
    for step in range(4):
        (sampled,) = (await runner.submit(plan)).sampled
        assert sampled is not None
        tokens.append(sampled.token_id)
        at = len(PROMPT) + 6 + step
        plan = StepPlan(step + 1, [StepRow(3, None, at, [[10, 11]], samples=True)])
    assert tokens == job.token_ids[6:]


async def test_a_new_sequence_sees_nothing_of_the_slot_s_last_one(runner: HostRunner) -> None:
    fresh = Job(PROMPT, 6, SEEDED)
    await generate(runner, [fresh])
    penalised = SamplingParams(
        temperature=2.0, seed=1, frequency_penalty=1.5, logit_bias=((fresh.token_ids[0], -100.0),)
    )
    await generate(runner, [Job(PROMPT[:5], 20, penalised)])
    again = Job(PROMPT, 6, SEEDED)
    await generate(runner, [again])
    assert again.token_ids == fresh.token_ids


@pytest.mark.parametrize("token_id", [0, 7, 159])
@pytest.mark.parametrize(
    "given", [{"temperature": 100.0}, {"top_k": 1}, {"repetition_penalty": 1e6, "frequency_penalty": 2.0}]
)
async def test_a_forced_token_is_sampled_whatever_the_request_says(
    runner: HostRunner, token_id: int, given: dict[str, float]
) -> None:
    sampling = SamplingParams(**given, seed=3, logprobs=1, logit_bias=((token_id, -100.0), (9, 100.0)))  # type: ignore[arg-type]
    forced = Job([*PROMPT, token_id], 3, force(sampling, token_id))
    await generate(runner, [forced])
    assert forced.token_ids == [token_id] * 3
    assert all(sampled.is_finite for sampled in forced.sampled)


async def test_masked_ids_wait_for_min_tokens(runner: HostRunner) -> None:
    free = Job(PROMPT, 1)
    await generate(runner, [free])
    masked = start(0, min_tokens=2, masked_ids=(free.token_ids[0],))
    result = await runner.submit(StepPlan(0, [StepRow(0, PROMPT, 0, [[1, 2]], samples=True)], [masked]))
    assert result.sampled[0] is not None
    assert result.sampled[0].token_id != free.token_ids[0]


async def test_logprobs_come_where_they_are_wanted(runner: HostRunner, reference: torch.nn.Module) -> None:
    wanted = Job(PROMPT, 1, SamplingParams(temperature=0.0, logprobs=3))
    bare, none = Job(PROMPT, 1, SamplingParams(temperature=0.0, logprobs=0)), Job(PROMPT, 1)
    await generate(runner, [none, wanted, bare])
    expected = reference_logits(reference, PROMPT)[-1].double().log_softmax(-1).topk(3)  # type: ignore[arg-type]
    top = wanted.sampled[0].top
    assert top is not None
    assert [token for token, _ in top] == expected.indices.tolist()
    assert [value for _, value in top] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert wanted.sampled[0].logprob == top[0][1] == bare.sampled[0].logprob
    assert bare.sampled[0].top == []
    assert (none.sampled[0].logprob, none.sampled[0].top) == (None, None)


@pytest.mark.parametrize("chunk", [1, 7, 128])
async def test_prompt_logprobs_equal_the_reference(
    runner: HostRunner, reference: torch.nn.Module, chunk: int
) -> None:
    prompt = PROMPT * 6  # more rows than are scored at a time
    job = Job(prompt, 1, wants_prompt_logprobs=2)
    other = Job(PROMPT, 4)
    await generate(runner, [other, job], chunk=chunk)
    logprobs = reference_logits(reference, prompt).double().log_softmax(-1)  # type: ignore[arg-type]
    assert job.prompt_logprobs[0] == (None, [])
    assert len(job.prompt_logprobs) == len(prompt)
    for position, (logprob, top) in enumerate(job.prompt_logprobs[1:], 1):
        row = logprobs[position - 1]
        assert logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
        assert [value for _, value in top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert job.token_ids == [int(logprobs[-1].argmax())]


async def test_rows_that_are_not_finite_are_flagged_alone(
    make_runner: Callable[..., HostRunner], heads: dict[str, int], tmp_path: Path
) -> None:
    poisoned = make_model(**heads)
    poisoned.model.embed_tokens.weight.data[NAN_TOKEN] = float("nan")
    runner = make_runner(load_model(save(poisoned, tmp_path), max_positions=256))
    healthy, ill = Job(PROMPT, 4, SEEDED), Job([*PROMPT, NAN_TOKEN], 1)
    await generate(runner, [ill, healthy])
    assert not ill.sampled[0].is_finite
    assert all(sampled.is_finite for sampled in healthy.sampled)
    alone = Job(PROMPT, 4, SEEDED)
    await generate(make_runner(), [alone])
    assert healthy.token_ids == alone.token_ids


async def test_a_failed_step_fails_its_future_only(runner: HostRunner) -> None:
    good = StepPlan(0, [StepRow(0, PROMPT, 0, [[1, 2]], samples=True)], [start(0)])
    bad = StepPlan(1, [StepRow(1, [999], 0, [[3]], samples=True)], [start(1)])
    first, failing = runner.submit(good), runner.submit(bad)
    assert (await first).sampled[0] is not None
    with pytest.raises(PlanError, match="token id"):
        await failing
    after = StepPlan(2, [StepRow(0, None, len(PROMPT), [[1, 2]], samples=True)])
    assert (await runner.submit(after)).step_id == 2


async def test_no_block_outside_of_the_cache_is_copied(runner: HostRunner) -> None:
    with pytest.raises(PlanError, match="a block must be in"):
        await runner.submit(StepPlan(0, [], copies=[(0, runner.traits.num_blocks)]))


async def test_prompt_logprobs_of_an_unscored_prefix_fail(runner: HostRunner) -> None:
    scored = StepRow(0, PROMPT, 0, [[1, 2]], samples=False, prompt_logprobs=1)
    await runner.submit(StepPlan(0, [scored], [start(0)]))  # another sequence, which had the slot before
    await runner.submit(StepPlan(0, [StepRow(0, PROMPT, 0, [[1, 2]], samples=False)], [start(0)]))
    row = StepRow(0, [1, 2], len(PROMPT), [[1, 2]], samples=False, prompt_logprobs=1)
    with pytest.raises(ValueError, match="before position 18"):
        await runner.submit(StepPlan(1, [row]))


async def test_at_most_two_steps_are_in_flight(runner: HostRunner) -> None:
    futures = [runner.submit(StepPlan(index, [])) for index in range(2)]
    with pytest.raises(RuntimeError, match="in flight"):
        runner.submit(StepPlan(2, []))
    results = await asyncio.gather(*futures)
    assert [result.step_id for result in results] == [0, 1]
    assert await runner.submit(StepPlan(3, [])) == StepResult(3, [])


async def test_a_cancelled_future_costs_no_place(runner: HostRunner) -> None:
    for index in range(5):
        runner.submit(StepPlan(index, [])).cancel()
        await runner.submit(StepPlan(index, []))


async def test_close_finishes_what_is_in_flight_and_ends_the_thread(
    make_runner: Callable[..., HostRunner],
) -> None:
    before = threading.active_count()
    runner = make_runner()
    future = runner.submit(StepPlan(7, [StepRow(0, PROMPT, 0, [[1, 2]], samples=True)], [start(0)]))
    runner.close()
    assert threading.active_count() == before
    assert (await future).step_id == 7
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(StepPlan(8, []))
