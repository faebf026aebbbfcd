"""Budgets of reasoning: when a choice has used its budget up, the end of the section is forced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import WatchedGrammar, ask, make_request
from tests.support.fake_runner import FakeRunner, letters
from tgi_asgi.engine.reasoning import ReasoningWatch, force
from tgi_asgi.runner.plan import DraftLimits
from tgi_asgi.types import ReasoningBudget, SamplingParams

START, END, ANSWER = 200, 201, 202  # no token that `letters` samples
SEEDED = SamplingParams(seed=7, logit_bias=((END, -100.0), (5, 1.0)))


def budget(num_tokens: int, *, is_open: bool = True, then: Sequence[int] = ()) -> ReasoningBudget:
    return ReasoningBudget(num_tokens, (START,), (END, *then), is_open)


def next_token(tokens: Sequence[int], sampling: SamplingParams, choice: int) -> int:
    """Sample as a runner does: a huge bias decides."""
    forced = [token for token, bias in sampling.logit_bias if bias > 1e6]
    return forced[0] if forced else letters(tokens, sampling, choice)


def expected(prompt: Sequence[int], num_tokens: int, forced: dict[int, int], choice: int = 0) -> list[int]:
    """Return the tokens of an answer in which some positions are forced."""
    tokens = list(prompt)
    for at in range(num_tokens):
        tokens.append(forced.get(at, letters(tokens, SEEDED, choice)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("given", "tokens", "forced"),
    [
        (budget(2), [1, 2, END, 3], [None, None, END, None, None]),
        (budget(0), [END, 3], [END, None, None]),
        (budget(2), [1, END, 2, 3, 4], [None] * 6),  # the model ends it itself
        (budget(1, is_open=False), [1, 2, START, 3, END, 4], [None, None, None, None, END, None, None]),
        (budget(0, is_open=False), [1, START, END, 2], [None, None, END, None, None]),
        # A second section gets what the first has left.
        (budget(2), [1, END, START, 2, END], [None, None, None, None, END, None]),
        (budget(1, then=[ANSWER]), [1, END, ANSWER, 2], [None, END, ANSWER, None, None]),
        (budget(1, then=[ANSWER]), [END, 1], [None] * 3),  # what follows is the model's own
        # Who opens another section after a forced end has to answer.
        (
            ReasoningBudget(1, (START,), (END,), True, (ANSWER,)),
            [1, END, START, END, ANSWER, START, END, ANSWER, 2],
            [None, END, None, END, ANSWER, None, END, ANSWER, None, None],
        ),
        # A call ends the section, and no end is forced within it.
        (ReasoningBudget(1, (START,), (END,), True, call_id=ANSWER), [ANSWER, 1, 2], [None] * 4),
        # A grammar that forbids the end, or the rest of it.
        (budget(1), [1, 2, 3, END, 4], [None, END, END, END, None, None]),
        (budget(1, then=[ANSWER, 9]), [1, END, 3, 4], [None, END, ANSWER, None, None]),
    ],
)
def test_a_token_is_forced_where_the_budget_is_used_up(
    given: ReasoningBudget, tokens: list[int], forced: list[int | None]
) -> None:
    watch = ReasoningWatch(given)
    found = [watch.forced_id]
    for token in tokens:
        has_changed = watch.push(token)
        assert has_changed is (watch.forced_id != found[-1])
        found.append(watch.forced_id)
    assert found == forced


@pytest.mark.parametrize(
    ("tokens", "is_inside"),
    [([1, 2, 3], True), ([1, 1, 2, 3], True), ([1, 2, 1, 2, 3], True), ([1, 2], False), ([2, 3], False)],
)
def test_a_mark_of_several_tokens_begins_a_section(tokens: list[int], is_inside: bool) -> None:
    watch = ReasoningWatch(ReasoningBudget(0, (1, 2, 3), (END,), False))
    for token in tokens:
        watch.push(token)
    assert (watch.forced_id == END) is is_inside


def test_forcing_replaces_a_ban_and_keeps_the_rest() -> None:
    forced = force(SEEDED, END)
    assert forced.temperature == 0 and forced.seed == SEEDED.seed
    assert forced.logit_bias[0] == (5, 1.0) and len(forced.logit_bias) == 2


@pytest.mark.parametrize("prompt_len", [5, 12, 16])
@pytest.mark.parametrize("num_thoughts", [0, 1, 9])
async def test_only_the_forced_tokens_differ(
    make_engine: MakeEngine, prompt_len: int, num_thoughts: int
) -> None:
    engine = make_engine(FakeRunner(next_token=next_token))
    request = make_request(
        prompt_len, 20, sampling=SEEDED, n=2, reasoning_budget=budget(num_thoughts, then=[ANSWER])
    )
    answer = await ask(engine, request)
    forced = {num_thoughts: END, num_thoughts + 1: ANSWER}
    for choice in range(2):
        assert answer.tokens(choice) == expected(request.prompt_ids, 20, forced, choice)


async def test_drafts_beyond_a_forced_token_are_dropped(make_engine: MakeEngine) -> None:
    runner = FakeRunner(next_token=next_token, drafts=DraftLimits(per_row=4, per_step=16))
    request = make_request(12, 24, sampling=SEEDED, reasoning_budget=budget(9))
    answer = await ask(make_engine(runner, speculate=4), request)
    assert any(row.num_drafts for plan in runner.plans for row in plan.rows)
    assert answer.tokens() == expected(request.prompt_ids, 24, {9: END})


async def test_free_text_of_a_grammar_may_have_a_budget(make_engine: MakeEngine) -> None:
    runner = FakeRunner(next_token=next_token)
    grammar = WatchedGrammar([END], masked_ids=[7])
    request = make_request(5, 12, sampling=SEEDED, grammar=grammar, reasoning_budget=budget(3))
    answer = await ask(make_engine(runner), request)
    assert answer.tokens() == expected(request.prompt_ids, 12, {3: END})
    free, forced, after = [start for plan in runner.plans for start in plan.starts]
    assert free.masked_ids == forced.masked_ids == (7,)
    assert (free.grammar, forced.grammar) == (None, None) and after.grammar is not None


async def test_a_preempted_choice_keeps_its_count(make_engine: MakeEngine) -> None:
    runner = FakeRunner(next_token=next_token, num_blocks=6)
    engine = make_engine(runner, max_total_tokens=80)
    requests = [
        make_request([i, *range(20)], 40, sampling=SEEDED, reasoning_budget=budget(12)) for i in range(3)
    ]
    answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens() == expected(request.prompt_ids, 40, {12: END})
    assert engine.stats.preemptions > 0
