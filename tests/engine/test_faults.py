"""Invariant: every accepted request ends exactly once, whatever fails, and healthy requests continue."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import ask, collect, make_request, submit
from tests.support.fake_runner import FakeRunner, FakeTokenizer, expected_tokens, fake_info, fake_logprob
from tests.support.waiting import until
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, InvalidRequest, TgiError, Unavailable
from tgi_asgi.runner.plan import DeviceLost, StepPlan, StepResult, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import EngineState, FinishReason, SamplingParams, TokenEvent

SEEDED = SamplingParams(seed=3)
POISON = 250


def poisoned_slots(runner: FakeRunner) -> Callable[[StepPlan], BaseException | None]:
    """Return a fault that fails every step with a row of a request whose prompt begins with POISON."""
    slots: dict[int, bool] = {}

    def fault(plan: StepPlan) -> BaseException | None:
        for start in plan.starts:
            slots[start.slot] = start.prompt_ids[0] == POISON
        return RuntimeError("poison") if any(slots.get(row.slot) for row in plan.rows) else None

    return fault


@pytest.mark.parametrize("num_others", [0, 1, 6, 31])
async def test_the_row_that_makes_a_step_fail_fails_alone(make_engine: MakeEngine, num_others: int) -> None:
    runner = FakeRunner(num_blocks=400)
    runner.fault = poisoned_slots(runner)
    engine = make_engine(runner)
    requests = [make_request([index] * 20, 30, sampling=SEEDED) for index in range(num_others)]
    requests.insert(num_others // 2, make_request([POISON] * 20, 30))
    answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        if request.prompt_ids[0] == POISON:
            assert isinstance(answer.error, GenerationFailed)
            assert request.request_id in str(answer.error)
            assert "poison" not in str(answer.error), "the cause belongs in the log"
        else:
            assert answer.error is None
            assert answer.tokens() == expected_tokens(request.prompt_ids, 30, sampling=SEEDED)
    assert engine.state is EngineState.READY
    assert (await ask(engine, make_request(9))).finish() is FinishReason.LENGTH


async def test_a_step_that_is_too_large_runs_in_halves(make_engine: MakeEngine) -> None:
    """This is what happens when memory runs out; no request may be lost."""
    runner = FakeRunner(num_blocks=400)
    runner.fault = lambda plan: MemoryError() if len(plan.rows) > 5 else None
    engine = make_engine(runner)
    requests = [make_request([index] * 20, 12, sampling=SEEDED, n=2) for index in range(10)]
    answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        for choice in range(2):
            assert answer.tokens(choice) == expected_tokens(
                request.prompt_ids, 12, sampling=SEEDED, choice=choice
            )
    assert engine.stats.failed == 0


async def test_a_chunk_that_finds_no_memory_runs_in_smaller_ones(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=400)
    runner.fault = lambda plan: MemoryError() if sum(row.num_tokens for row in plan.rows) > 100 else None
    engine = make_engine(runner)
    prompt = [index % 200 for index in range(1000)]
    answer = await ask(engine, make_request(prompt, 5, sampling=SEEDED))
    assert answer.tokens() == expected_tokens(prompt, 5, sampling=SEEDED)
    num_failed = engine.stats.failed_steps
    assert num_failed > 0
    assert (await ask(engine, make_request([7] * 1000, 5))).error is None
    assert engine.stats.failed_steps - num_failed < 5, "the engine must have learnt the smaller size"
    assert engine.stats.failed == 0


async def test_a_decode_step_that_finds_no_memory_does_not_make_chunks_smaller(
    make_engine: MakeEngine,
) -> None:
    runner = FakeRunner(num_blocks=400)
    engine = make_engine(runner)
    faults = [MemoryError()]

    def fault(plan: StepPlan) -> Exception | None:
        is_decode_step = len(plan.rows) == 2 and all(row.token_ids is None for row in plan.rows)
        return faults.pop() if faults and is_decode_step else None

    runner.fault = fault
    before = engine._loop._budget._limit
    answers = await asyncio.gather(*(ask(engine, make_request([index] * 9, 20)) for index in range(2)))
    assert [answer.error for answer in answers] == [None, None]
    assert engine.stats.failed_steps == 1
    assert engine._loop._budget._limit == before


async def test_a_client_whose_prompts_all_fail_does_not_end_the_server(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=400)
    runner.fault = poisoned_slots(runner)
    engine = make_engine(runner)
    answers = await asyncio.gather(*(ask(engine, make_request([POISON] * 20, 5)) for _ in range(40)))
    assert all(isinstance(answer.error, GenerationFailed) for answer in answers)
    for _ in range(20):
        await ask(engine, make_request([POISON] * 20, 5))
    assert engine.state is EngineState.READY
    assert (await ask(engine, make_request(9))).finish() is FinishReason.LENGTH


async def test_prompts_without_finite_logits_do_not_end_the_server(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=400)
    runner.is_poisoned = lambda tokens: tokens[0] == POISON
    engine = make_engine(runner)
    bad = [ask(engine, make_request([POISON] * 20, 5)) for _ in range(20)]
    good, *rest = await asyncio.gather(ask(engine, make_request([1] * 20, 30)), *bad)
    assert good.tokens() == expected_tokens([1] * 20, 30)
    assert all(isinstance(answer.error, GenerationFailed) for answer in rest)
    assert engine.state is EngineState.READY


async def test_a_row_without_finite_logits_fails_alone_and_is_not_cached(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=200)
    engine = make_engine(runner)
    poison = [POISON] * 40
    runner.is_poisoned = lambda tokens: tokens[0] == POISON and len(tokens) > 44
    good, bad = await asyncio.gather(
        ask(engine, make_request([5] * 40, 30, sampling=SEEDED)),
        ask(engine, make_request(poison, 30, sampling=SEEDED, n=2)),
    )
    assert good.tokens() == expected_tokens([5] * 40, 30, sampling=SEEDED)
    assert isinstance(bad.error, GenerationFailed)
    assert "not finite" in str(bad.error)
    assert bad.finish() is None
    runner.is_poisoned = None
    again = await ask(engine, make_request(poison, 30, sampling=SEEDED))
    assert again.stats.cached_tokens == 0
    assert again.tokens() == expected_tokens(poison, 30, sampling=SEEDED)


async def test_a_request_that_failed_gets_nothing_after_its_error(make_engine: MakeEngine) -> None:
    """One choice is poisoned; another has a token in the same step."""

    class Recorder:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def on_events(self, events: Sequence[TokenEvent]) -> None:
            self.seen += [event.index for event in events]

        def on_error(self, error: TgiError) -> None:
            self.seen.append(type(error))

    prompt = [1] * 20
    runner = FakeRunner()
    poisoned = prompt + expected_tokens(prompt, 3, sampling=SEEDED, choice=0)
    runner.is_poisoned = lambda tokens: list(tokens) == poisoned
    engine = make_engine(runner)
    recorder = Recorder()
    channel = submit(engine, make_request(prompt, 30, sampling=SEEDED, n=2))
    channel.attach(recorder)
    await until(lambda: channel.is_ended)
    await ask(engine, make_request([2], 5))
    assert recorder.seen == [0, 0, 1, 0, 1, GenerationFailed]


@pytest.mark.parametrize("max_step_tokens", [4096, 24])
async def test_prompt_logprobs_survive_a_fault_in_the_middle_of_the_prompt(
    make_engine: MakeEngine, max_step_tokens: int
) -> None:
    """The runner keeps scores between chunks, so the prompt starts again, in steps of the usual size."""
    runner = FakeRunner(max_step_tokens=max_step_tokens)
    engine = make_engine(runner, max_batch_prefill_tokens=16)
    prompt = list(range(60))
    other = submit(engine, make_request([200] * 5, 20))
    runner.fault = lambda plan: (
        RuntimeError("once") if len(plan.rows) == 2 and plan.rows[1].start == 32 else None
    )
    answer = await ask(engine, make_request(prompt, 3, prompt_logprobs=0))
    assert answer.error is None
    assert answer.stats.prompt_logprobs is not None
    assert [entry[0] for entry in answer.stats.prompt_logprobs] == [None, *map(fake_logprob, prompt[1:])]
    assert (await collect(other)).error is None
    assert engine.stats.failed_steps >= 1


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
async def test_a_later_chunk_that_always_fails_ends_a_prompt_that_starts_again(
    make_engine: MakeEngine, kind: type[Exception]
) -> None:
    """Its first chunks succeed when they are retried, which must not hide that the later one never does."""
    runner = FakeRunner(max_step_tokens=24, num_blocks=300)

    def is_faulty(row: StepRow) -> bool:
        return row.prompt_logprobs is not None and row.end > 48

    runner.fault = lambda plan: kind() if any(map(is_faulty, plan.rows)) else None
    engine = make_engine(runner, max_batch_prefill_tokens=16)
    other = submit(engine, make_request([200] * 5, 100))
    answer = await ask(engine, make_request(list(range(60)), 3, prompt_logprobs=0))
    assert isinstance(answer.error, GenerationFailed)
    assert (await collect(other)).tokens() == expected_tokens([200] * 5, 100)
    assert engine.stats.failed_steps < 40


async def test_an_end_that_the_model_cannot_sample_is_not_masked(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may have more tokens than the model; the runner refuses ids outside the vocabulary."""
    monkeypatch.setattr(FakeTokenizer, "eos_ids", FakeTokenizer.eos_ids | {5000})
    masked: list[int] = []
    runner = FakeRunner()
    runner.fault = lambda plan: masked.extend(i for start in plan.starts for i in start.masked_ids)
    await ask(make_engine(runner), make_request([1], 4, stop={"min_tokens": 2}))
    assert masked == sorted(fake_info().eos_token_ids)


async def test_cancellations_are_heard_while_a_fault_is_looked_for(make_engine: MakeEngine) -> None:
    runner = FakeRunner(is_manual=True)
    engine = make_engine(runner)
    channels = [submit(engine, make_request([index], 50)) for index in range(8)]
    await until(lambda: runner.num_in_flight == 2)
    runner.fault = lambda plan: RuntimeError("broken") if len(plan.rows) > 1 else None
    for _ in range(2):
        runner.run_next()
    await until(lambda: runner.num_in_flight == 1)
    channels[7].cancel()
    runner.run_next()
    await until(lambda: runner.num_in_flight == 1)
    assert channels[7].is_ended
    runner.is_manual = False
    runner.fault = None
    runner.run_next()
    for answer in await asyncio.gather(*map(collect, channels[:7])):
        assert answer.finish() is FinishReason.LENGTH


async def test_faults_at_random_steps_lose_no_request_and_change_no_token(make_engine: MakeEngine) -> None:
    rng = random.Random(2)
    runner = FakeRunner(num_blocks=40, max_batch_size=8)
    runner.fault = lambda plan: RuntimeError("flaky") if len(plan.rows) > 1 and rng.random() < 0.2 else None
    engine = make_engine(runner)
    requests = [
        make_request(
            [index % 4] * rng.randrange(1, 40), rng.randrange(1, 40), sampling=SEEDED, n=1 + index % 3
        )
        for index in range(40)
    ]
    channels = [submit(engine, request) for request in requests]
    answering = [asyncio.create_task(collect(channel)) for channel in channels]
    for channel in channels[::5]:
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
        channel.cancel()
    answers = await asyncio.gather(*answering)
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        for choice in range(request.n):
            tokens = answer.tokens(choice)
            length = len(tokens) if index % 5 == 0 else request.stop.max_tokens
            assert tokens == expected_tokens(request.prompt_ids, length, sampling=SEEDED, choice=choice)
    assert engine.stats.failed == 0
    assert engine.stats.failed_steps > 10


async def test_a_runner_that_refuses_a_step_fails_its_rows_alone(make_engine: MakeEngine) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    original = runner.submit
    runner.submit = lambda plan: (_ for _ in ()).throw(ValueError("no"))  # type: ignore[method-assign]
    answers = await asyncio.gather(*(ask(engine, make_request([index], 4)) for index in range(3)))
    assert all(isinstance(answer.error, GenerationFailed) for answer in answers)
    runner.submit = original  # type: ignore[method-assign]
    assert (await ask(engine, make_request(9))).finish() is FinishReason.LENGTH


async def test_a_token_without_text_fails_its_request_alone(make_engine: MakeEngine) -> None:
    """A model may have more logits than its tokenizer has tokens."""

    def next_token(tokens: Sequence[int], sampling: SamplingParams, choice: int) -> int:
        return 999_999 if tokens[0] == POISON else 97

    engine = make_engine(FakeRunner(next_token=next_token))
    bad, good = await asyncio.gather(ask(engine, make_request([POISON])), ask(engine, make_request([1])))
    assert isinstance(bad.error, GenerationFailed)
    assert good.text() == "a" * 8


class FatalErrors:
    """Records the errors that `on_fatal` reports."""

    def __init__(self) -> None:
        self.errors: list[TgiError] = []

    def __call__(self, error: TgiError) -> None:
        self.errors.append(error)


def mortal(runner: FakeRunner, fatal_errors: FatalErrors, **settings: Any) -> Engine:
    """Return an engine whose end is recorded."""
    engine = Engine(runner, FakeTokenizer(), Settings(**settings), fake_info())
    engine.on_fatal = fatal_errors
    return engine


async def assert_dead(engine: Engine, fatal_errors: FatalErrors, reason: str) -> None:
    await until(lambda: engine.state is EngineState.DEAD)
    assert len(fatal_errors.errors) == 1
    assert reason in str(fatal_errors.errors[0])
    with pytest.raises(Unavailable):
        engine.acquire(1)
    assert engine.stats.failed == engine.stats.accepted
    assert engine.admission.num_taken == 0
    assert engine.scheduler.pool.num_used == 0
    await engine.stop()


async def test_a_lost_device_ends_everything_at_once() -> None:
    runner, fatal_errors = FakeRunner(), FatalErrors()
    runner.fault = lambda plan: DeviceLost("CUDA error") if plan.step_id == 4 else None
    engine = mortal(runner, fatal_errors)
    engine.start()
    answers = await asyncio.gather(*(ask(engine, make_request([index], 50)) for index in range(4)))
    assert all(isinstance(answer.error, GenerationFailed) for answer in answers)
    await assert_dead(engine, fatal_errors, "CUDA error")


async def test_a_device_that_loses_a_part_of_itself_ends_everything_whatever_runs() -> None:
    runner, fatal_errors = FakeRunner(is_manual=True), FatalErrors()
    engine = mortal(runner, fatal_errors)
    engine.start()
    asking = [asyncio.create_task(ask(engine, make_request([index], 50))) for index in range(4)]
    await until(lambda: engine.stats.accepted == 4)
    await asyncio.to_thread(engine.mark_lost, "shard 1 has ended")
    answers = await asyncio.gather(*asking)
    assert all(isinstance(answer.error, GenerationFailed) for answer in answers)
    await assert_dead(engine, fatal_errors, "shard 1 has ended")


async def test_a_part_that_is_lost_before_the_engine_starts_is_not_forgotten() -> None:
    fatal_errors = FatalErrors()
    engine = mortal(FakeRunner(), fatal_errors)
    engine.mark_lost("shard 1 has ended")
    engine.start()
    await assert_dead(engine, fatal_errors, "shard 1 has ended")


async def test_a_hung_step_is_noticed() -> None:
    runner, fatal_errors = FakeRunner(is_manual=True), FatalErrors()
    engine = mortal(runner, fatal_errors, step_timeout_s=0.02)
    engine.start()
    answers = await asyncio.gather(*(ask(engine, make_request([index], 50)) for index in range(4)))
    assert all(isinstance(answer.error, GenerationFailed) for answer in answers)
    await assert_dead(engine, fatal_errors, "has not ended")


async def test_a_step_that_hangs_while_a_fault_is_looked_for_is_noticed() -> None:
    runner, fatal_errors = FakeRunner(), FatalErrors()

    def fault(plan: StepPlan) -> BaseException | None:
        runner.is_manual = True
        return RuntimeError("then silence")

    runner.fault = fault
    engine = mortal(runner, fatal_errors, step_timeout_s=0.02)
    engine.start()
    answers = await asyncio.gather(*(ask(engine, make_request([index], 50)) for index in range(4)))
    assert all(isinstance(answer.error, GenerationFailed) for answer in answers)
    await assert_dead(engine, fatal_errors, "has not ended")


async def test_slow_steps_are_no_hung_steps(make_engine: MakeEngine) -> None:
    """Each step takes less than the limit; together they take far more."""
    engine = make_engine(FakeRunner(step_s=0.02), step_timeout_s=0.4)
    assert (await ask(engine, make_request(9, 40))).finish() is FinishReason.LENGTH


async def test_an_engine_whose_steps_all_fail_does_not_stay_up() -> None:
    runner, fatal_errors = FakeRunner(), FatalErrors()
    runner.fault = lambda plan: RuntimeError("all broken")
    engine = mortal(runner, fatal_errors)
    engine.start()
    answers = await asyncio.gather(*(ask(engine, make_request([index], 5)) for index in range(40)))
    assert all(isinstance(answer.error, GenerationFailed) for answer in answers)
    await assert_dead(engine, fatal_errors, "all broken")
    assert engine.stats.failed_steps < 40


BIASED = {"sampling": SamplingParams(logit_bias=((7, -1.0),)), "grammar": Grammar(lambda: None, None)}


@pytest.mark.parametrize(
    "fields", [{}, BIASED], ids=["any requests", "requests whose bias could be the reason"]
)
async def test_an_engine_without_finite_logits_does_not_stay_up(fields: dict[str, Any]) -> None:
    runner, fatal_errors = FakeRunner(is_poisoned=lambda tokens: True), FatalErrors()
    engine = mortal(runner, fatal_errors)
    engine.start()
    requests = [make_request([index], 5, **fields) for index in range(6)]
    answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    assert all(answer.error is not None for answer in answers)
    await assert_dead(engine, fatal_errors, "not finite")


async def test_a_bug_in_the_engine_is_not_silent() -> None:
    fatal_errors = FatalErrors()
    engine = mortal(FakeRunner(), fatal_errors)
    engine.start()
    channel = submit(engine, make_request(9, 50))
    await until(lambda: engine.stats.sampled_tokens > 2)
    engine.scheduler.apply = None  # type: ignore[method-assign, assignment]
    assert isinstance((await collect(channel)).error, GenerationFailed)
    await assert_dead(engine, fatal_errors, "the engine failed")


@pytest.mark.parametrize("num_steps", [0, 3])
async def test_an_engine_whose_task_is_cancelled_is_dead(num_steps: int) -> None:
    """A timeout of code that runs in the task could cancel it; only `stop` may end the task."""
    runner, fatal_errors = FakeRunner(is_manual=True), FatalErrors()
    engine = mortal(runner, fatal_errors)
    engine.start()
    channel = submit(engine, make_request(9, 50))
    for _ in range(num_steps):
        await until(lambda: runner.num_in_flight > 0)
        runner.run_next()
    (task,) = (task for task in asyncio.all_tasks() if task.get_name() == "engine")
    task.cancel()
    assert isinstance((await collect(channel)).error, GenerationFailed)
    runner.is_manual = False
    await assert_dead(engine, fatal_errors, "cancelled")


async def test_stopping_is_no_death(make_engine: MakeEngine) -> None:
    engine, fatal_errors = make_engine(), FatalErrors()
    engine.on_fatal = fatal_errors
    channel = submit(engine, make_request(9, 50))
    await until(lambda: channel.stats.scheduled_s is not None)
    await engine.stop()
    assert isinstance((await collect(channel)).error, IncompleteGeneration)
    assert fatal_errors.errors == [] and engine.state is EngineState.DRAINING


async def test_a_ban_on_all_that_a_grammar_allows_is_the_client_s_mistake(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=200)
    runner.is_poisoned = lambda tokens: tokens[0] == POISON  # as the sampler does for a row without a token
    engine = make_engine(runner)
    grammar = Grammar(lambda: None, None)
    banned = make_request([POISON], 5, sampling=SamplingParams(logit_bias=((7, -100.0),)), grammar=grammar)
    for _ in range(10):
        answer = await ask(engine, banned)
        assert isinstance(answer.error, InvalidRequest) and "logit_bias" in str(answer.error)
    assert isinstance((await ask(engine, make_request([POISON], 5, grammar=grammar))).error, GenerationFailed)
    assert engine.state is EngineState.READY
    await until(lambda: engine.stats.blocks_used == 0)


async def test_a_grammar_that_cannot_go_on_fails_its_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FakeRunner(is_manual=True)
    execute = runner.execute

    def failing(plan: StepPlan, *, is_tainted: bool = False) -> StepResult:
        result = execute(plan, is_tainted=is_tainted)
        for row, sampled in zip(plan.rows, result.sampled, strict=True):
            if row.slot == 0 and sampled is not None:
                sampled.failure = "too many expressions"
        return result

    monkeypatch.setattr(runner, "execute", failing)
    engine = make_engine(runner)
    bound, free = submit(engine, make_request(5)), submit(engine, make_request(6))
    await until(lambda: runner.num_in_flight > 0)
    runner.is_manual = False
    runner.run_next()
    failed, fine = await asyncio.gather(collect(bound), collect(free))
    assert isinstance(failed.error, InvalidRequest) and "too many expressions" in str(failed.error)
    assert fine.error is None and fine.finish() is FinishReason.LENGTH
