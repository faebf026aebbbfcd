"""Grammars in the engine: free text needs none before its mark; a minimum length needs one from the start."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import WatchedGrammar, ask, make_request
from tests.support.fake_runner import (
    EOS_ID,
    FakeRunner,
    expected_tokens,
)
from tgi_asgi.types import SamplingParams

SEEDED = SamplingParams(seed=7)


@pytest.mark.parametrize("prompt_len", [5, 12, 13])  # the slot restarts inside a block, or at its start
async def test_free_text_needs_no_grammar_until_its_mark(make_engine: MakeEngine, prompt_len: int) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    prompt = make_request(prompt_len).prompt_ids
    expected = expected_tokens(prompt, 20, sampling=SEEDED)
    wake = next(index for index in range(3, 20) if expected[index] not in expected[:index])
    grammar = WatchedGrammar([expected[wake]], masked_ids=[7])
    answer = await ask(engine, make_request(prompt, 20, sampling=SEEDED, grammar=grammar))
    assert answer.tokens() == expected
    before, behind = [start for plan in runner.plans for start in plan.starts]
    assert before.grammar is None and (before.masked_ids, before.min_tokens) == ((7,), 20)
    assert behind.grammar is cast(Any, grammar) and behind.masked_ids == ()
    assert behind.output_ids == expected[: wake + 1]


async def test_a_request_for_a_least_length_is_masked_from_its_beginning(make_engine: MakeEngine) -> None:
    runner = FakeRunner()
    grammar = WatchedGrammar([97])
    await ask(make_engine(runner), make_request(5, stop={"min_tokens": 2}, grammar=grammar))
    (start,) = [start for plan in runner.plans for start in plan.starts]
    assert start.grammar is cast(Any, grammar) and start.masked_ids == (EOS_ID,)
