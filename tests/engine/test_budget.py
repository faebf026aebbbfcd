from __future__ import annotations

import pytest

from tgi_asgi.engine.budget import TokenBudget


def make_budget(target_s: float = 0.05) -> TokenBudget:
    return TokenBudget(max_tokens=4096, block_size=16, target_s=target_s)


def test_the_first_chunk_is_modest_whatever_the_maximum() -> None:
    assert make_budget().tokens(0) == 128
    assert TokenBudget(max_tokens=100, block_size=16, target_s=0.05).tokens(0) == 100


def test_a_prompt_alone_gets_the_maximum() -> None:
    budget = make_budget()
    budget.observe(512, 10.0)
    assert budget.tokens(0) == 4096


@pytest.mark.parametrize("decode_s", [0.005, 0.02, 0.045])
@pytest.mark.parametrize("cost_s", [0.00002, 0.0002, 0.001])
@pytest.mark.parametrize("fixed_s", [0.0, 0.004])
def test_mixed_steps_settle_on_the_target(decode_s: float, cost_s: float, fixed_s: float) -> None:
    """Whatever the machine costs, and however wrong the first guess was."""
    budget = make_budget()
    budget.observe(512, 512 * cost_s * 5)
    budget.observe(0, decode_s)
    for _ in range(60):
        tokens = budget.tokens(8)
        duration_s = decode_s + fixed_s + tokens * cost_s
        budget.observe(tokens, duration_s)
    room_s = max(0.05, decode_s * 1.5)
    assert tokens % 16 == 0
    assert tokens in (16, 4096) or room_s - 33 * cost_s <= duration_s <= room_s * 1.001


def test_short_prompts_say_little_of_what_a_token_costs() -> None:
    """Reading the weights takes 20 ms whatever a step computes: that is no 4 ms a token."""
    budget = make_budget()
    budget.observe(0, 0.02)
    budget.observe(512, 0.02 + 512 * 0.0002)
    before = budget.tokens(8)
    for _ in range(4):
        budget.observe(5, 0.021)
    assert budget.tokens(8) == pytest.approx(before, abs=32)


def test_prompts_advance_even_where_decoding_alone_misses_the_target() -> None:
    budget = make_budget()
    budget.observe(512, 0.512)
    for _ in range(20):
        budget.observe(0, 0.2)
    assert 90 <= budget.tokens(64) <= 100  # half of the decode time at 1 ms a token


def test_at_least_one_block_is_given() -> None:
    budget = make_budget()
    budget.observe(16, 16.0)
    assert budget.tokens(1) == 16


def test_prediction_follows_what_was_seen() -> None:
    budget = make_budget()
    assert budget.predict_s(1000) == 0.0
    budget.observe(100, 0.1)
    assert budget.predict_s(1000) == pytest.approx(1.0)
