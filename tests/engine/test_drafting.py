"""Drafts in the engine: what clients see of several tokens per step, and which resources drafts use."""

from __future__ import annotations

import asyncio

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import ask, collect, make_request, submit
from tests.support.fake_runner import FakeRunner, expected_tokens, script
from tests.support.waiting import until
from tgi_asgi.runner.plan import DraftLimits, StepPlan
from tgi_asgi.types import FinishReason

LIMITS = DraftLimits(8, 64)


async def test_drafts_save_steps_and_change_no_token(make_engine: MakeEngine) -> None:
    plain, drafting = FakeRunner(), FakeRunner(drafts=LIMITS)
    request = make_request(20, max_tokens=40)
    answers = [await ask(make_engine(runner), request) for runner in (plain, drafting)]
    assert answers[0].tokens() == answers[1].tokens() == expected_tokens(request.prompt_ids, 40)
    assert len(drafting.plans) < len(plain.plans) * 2 / 3


async def test_what_is_sampled_behind_the_end_is_not_told(make_engine: MakeEngine) -> None:
    runner = FakeRunner(drafts=LIMITS, next_token=script(b"one two, three, four, five")(5))
    engine = make_engine(runner)
    answer = await ask(engine, make_request(5, max_tokens=30, stop={"stop": (",",)}))
    assert answer.text() == "one two"
    assert answer.finish() is FinishReason.STOP
    assert len(answer.tokens()) == answer.stats.generated_tokens == engine.stats.sampled_tokens == 8


async def test_drafts_are_counted(make_engine: MakeEngine) -> None:
    runner = FakeRunner(drafts=LIMITS)
    engine = make_engine(runner)
    await ask(engine, make_request(20, max_tokens=40))
    await until(lambda: not runner.num_in_flight)
    stats = engine.stats
    num_steps = sum(1 for plan in runner.plans if plan.rows)
    assert 0 < stats.accepted_draft_tokens <= stats.draft_tokens
    assert 0 < stats.drafted_rows <= num_steps
    assert stats.skipped_tokens.count + stats.skipped_tokens.total == stats.sampled_tokens
    assert stats.skipped_tokens.total > 0
    # A finished sequence may discard tokens that a step in flight has sampled for it.
    assert stats.skipped_tokens.total <= stats.accepted_draft_tokens
    assert stats.inter_token_s.count >= stats.sampled_tokens - 1


async def test_drafts_do_not_exceed_what_a_step_holds(make_engine: MakeEngine) -> None:
    runner = FakeRunner(drafts=LIMITS, max_step_tokens=20)
    engine = make_engine(runner)
    await asyncio.gather(*(ask(engine, make_request(9 + own, max_tokens=30)) for own in range(4)))
    assert any(row.num_drafts for plan in runner.plans for row in plan.rows)
    sizes = [sum(row.num_tokens + row.num_drafts for row in plan.rows) for plan in runner.plans]
    assert max(sizes) <= 20


async def test_nobody_is_preempted_for_a_draft(make_engine: MakeEngine) -> None:
    requests = [make_request(range(at, at + 17), max_tokens=14) for at in (0, 60, 120)]
    runner = FakeRunner(num_blocks=6, drafts=LIMITS)  # two blocks for each request use them all
    engine = make_engine(runner)
    answers = await asyncio.gather(*(collect(submit(engine, request)) for request in requests))
    assert engine.stats.preemptions == 0
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens() == expected_tokens(request.prompt_ids, 14)


async def test_steps_with_prompts_or_many_rows_have_no_drafts(make_engine: MakeEngine) -> None:
    runner = FakeRunner(drafts=DraftLimits(8, 4), num_blocks=200)
    engine = make_engine(runner)
    await asyncio.gather(
        *(
            ask(engine, make_request(range(at, at + 9), max_tokens=12 if at else 60))
            for at in range(0, 100, 10)
        )
    )

    def has_drafts(plan: StepPlan) -> bool:
        return any(row.num_drafts for row in plan.rows)

    assert any(map(has_drafts, runner.plans)), "those that are left when others have ended"
    for plan in runner.plans:
        num_given = sum(row.token_ids is not None and row.num_tokens > 1 for row in plan.rows)
        assert not (has_drafts(plan) and (num_given or len(plan.rows) > 4))


async def test_a_failed_step_with_drafts_runs_again(make_engine: MakeEngine) -> None:
    runner = FakeRunner(drafts=LIMITS)
    failures = iter([None] * 5 + [RuntimeError("once")])
    runner.fault = lambda plan: next(failures, None)
    requests = [make_request(range(at, at + 20), max_tokens=40) for at in (0, 100)]
    engine = make_engine(runner)
    answers = await asyncio.gather(*(collect(submit(engine, request)) for request in requests))
    assert engine.stats.failed_steps == 1
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens() == expected_tokens(request.prompt_ids, 40)
