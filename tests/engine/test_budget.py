from __future__ import annotations

import math

import pytest

from tgi_asgi.engine.budget import NextPrompt, TokenBudget
from tgi_asgi.engine.step_time import StepSize


def make_budget(target_s: float = 0.05) -> TokenBudget:
    return TokenBudget(max_tokens=4096, block_size=16, target_s=target_s)


def test_the_first_chunk_is_modest_whatever_the_maximum() -> None:
    assert make_budget().tokens(0, NextPrompt(4000)) == 128
    assert TokenBudget(max_tokens=100, block_size=16, target_s=0.05).tokens(0, NextPrompt(4000)) == 100


def test_no_chunk_is_shorter_than_what_a_gpu_computes_in_the_time_of_a_token() -> None:
    budget = TokenBudget(max_tokens=4096, block_size=16, target_s=0.05, min_tokens=512)
    assert budget.tokens(0, NextPrompt(4000)) == 512
    budget.observe(StepSize(0, 512), 0.512)
    for _ in range(20):
        budget.observe(StepSize(64, 0), 0.2)
    assert (
        budget.tokens(64, NextPrompt(4000)) == 512
    )  # 96 without the minimum: see the test of prompts that advance
    budget.shrink(512)
    assert budget.tokens(64, NextPrompt(4000)) == 256, "a size that exceeded memory must not be tried again"


@pytest.mark.parametrize(
    ("token_s", "prompt_len", "least", "most"),
    [
        (0.0001, 500, 4096, 4096),
        (0.0001, 99_000, 3700, 4096),
        (0.001, 900, 900, 1100),
        (0.001, 1200, 350, 420),
        (0.02, 40, 256, 256),
        (0.02, 99_000, 256, 256),
    ],
)
def test_steps_alone_are_shorter_if_the_next_prompt_does_not_fit(
    token_s: float, prompt_len: int, least: int, most: int
) -> None:
    """What arrives waits for one of them: with 4,096 tokens of 20 ms, for over a minute."""
    budget = make_budget()
    for _ in range(40):
        tokens = budget.tokens(0, NextPrompt(prompt_len))
        budget.observe(StepSize(0, tokens), 0.01 + tokens * token_s)
    assert (
        least <= budget.tokens(0, NextPrompt(prompt_len)) <= most
        and budget.tokens(0, NextPrompt(prompt_len)) % 16 == 0
    )


def test_parts_of_long_prompts_stay_short() -> None:
    """A token costs more the more come before it: without a term for that, parts grew to 1.4 s here."""
    budget, parts_s = make_budget(), []
    for num_tokens in (3000, 6500, 6500):
        at = 0
        while at < num_tokens:
            tokens = min(budget.tokens(0, NextPrompt(num_tokens, num_before=at)), num_tokens - at)
            size = StepSize(0, tokens, tokens * (at + tokens / 2))
            duration_s = 0.012 + tokens * 0.0012 + size.num_pairs * 2.2e-7
            budget.observe(size, duration_s)
            at += tokens
            if at < num_tokens:
                parts_s.append(duration_s)
        for _ in range(4):
            budget.observe(StepSize(1, 0), 0.013 + num_tokens * 2.2e-7)
    assert len(parts_s) > 20 and max(parts_s) < 0.7  # the last ones have the least number of tokens


def test_pairs_are_averaged_with_the_steps_that_have_them() -> None:
    """Steps of one size are learnt from by eights; that their pairs grow must not look like slow tokens."""
    budget = make_budget()
    for at in range(0, 20_000, 128):
        size = StepSize(1, 128, 128 * (at + 64))
        budget.observe(size, 0.004 + 128 * 0.0002 + size.num_pairs * 2e-8)
    assert budget.predict_s(StepSize(1, 128, 128 * 64)) == pytest.approx(0.004 + 128 * 0.0002, rel=0.2)


@pytest.mark.parametrize("decode_s", [0.005, 0.02, 0.045])
@pytest.mark.parametrize("cost_s", [0.00002, 0.0002, 0.001])
@pytest.mark.parametrize("fixed_s", [0.0, 0.004])
def test_mixed_steps_settle_on_the_target(decode_s: float, cost_s: float, fixed_s: float) -> None:
    """This holds for any machine and any error of the first guess."""
    budget = make_budget()
    budget.observe(StepSize(0, 512), 512 * cost_s * 5)
    budget.observe(StepSize(8, 0), decode_s)
    for _ in range(60):
        tokens = budget.tokens(8, NextPrompt(4000))
        duration_s = decode_s + fixed_s + tokens * cost_s
        budget.observe(StepSize(8, tokens), duration_s)
    room_s = max(0.05, decode_s * 1.5)  # the target may apply if equal-sized steps hide the decode time
    assert tokens % 16 == 0
    assert tokens in (16, 4096) or 0.95 * 0.05 - 33 * cost_s <= duration_s <= room_s * 1.001


def test_short_prompts_say_little_of_what_a_token_costs() -> None:
    """Reading the weights takes 20 ms for any step; five tokens must not count as 4 ms each."""
    budget = make_budget()
    budget.observe(StepSize(8, 0), 0.02)
    budget.observe(StepSize(8, 512), 0.02 + 512 * 0.0002)
    before = budget.tokens(8, NextPrompt(4000))
    for _ in range(4):
        budget.observe(StepSize(8, 5), 0.021)
    assert budget.tokens(8, NextPrompt(4000)) == pytest.approx(before, abs=32)


def test_prompts_advance_even_where_decoding_alone_misses_the_target() -> None:
    budget = make_budget()
    budget.observe(StepSize(0, 512), 0.512)
    for _ in range(20):
        budget.observe(StepSize(64, 0), 0.2)
    assert 90 <= budget.tokens(64, NextPrompt(4000)) <= 100  # half of the decode time, at 1 ms a token


def test_a_target_without_end_lets_every_step_have_the_most_prompt_tokens() -> None:
    budget = make_budget(math.inf)
    budget.observe(StepSize(0, 128), 0.1)
    budget.observe(StepSize(4, 128), 0.2)
    assert budget.tokens(4, NextPrompt(4000)) == 4096


def test_steps_of_one_size_are_learnt_from_together() -> None:
    """The first step counts at once; later, the mean of eight steps shows that a machine has slowed down."""
    budget = make_budget()
    budget.observe(StepSize(4, 0), 0.01)
    first_s = budget.predict_s(StepSize(4, 0))
    assert first_s == pytest.approx(0.01, rel=0.1)
    for duration_s in (0.02, 0.04, 0.02, 0.04, 0.02, 0.04, 0.03):
        budget.observe(StepSize(4, 0), duration_s)
        assert budget.predict_s(StepSize(4, 0)) == first_s
    budget.observe(StepSize(4, 0), 0.03)
    later_s = budget.predict_s(StepSize(4, 0))
    assert 1.1 * first_s < later_s <= 0.03
    budget.observe(StepSize(5, 0), 0.05)  # a step of another size counts at once
    assert budget.predict_s(StepSize(4, 0)) > later_s


def test_at_least_one_block_is_given() -> None:
    budget = make_budget()
    budget.observe(StepSize(0, 16), 16.0)
    assert budget.tokens(1, NextPrompt(4000)) == 16


def test_prediction_follows_what_was_seen() -> None:
    budget = make_budget()
    assert budget.predict_s(StepSize(0, 1000)) == 0.0
    budget.observe(StepSize(0, 100), 0.1)
    assert budget.predict_s(StepSize(0, 1000)) == pytest.approx(1.0, rel=0.05)


def test_the_share_of_prompts_grows_with_their_wait() -> None:
    budget = make_budget(target_s=0.01)
    for _ in range(10):
        budget.observe(StepSize(0, 512), 0.512)
        budget.observe(StepSize(64, 0), 0.04)
    tokens = [budget.tokens(64, NextPrompt(4000), waited_s) for waited_s in (-1.0, 0.0, 0.5, 1.0, 60.0)]
    assert tokens[0] == tokens[1] == pytest.approx(20, abs=16)  # half of the decode time, at 1 ms a token
    assert tokens[1] < tokens[2] < tokens[3] == tokens[4] == pytest.approx(100, abs=16)  # 2.5 times


def test_the_target_stretches_with_the_wait() -> None:
    budget = make_budget(target_s=0.1)
    for _ in range(10):
        budget.observe(StepSize(0, 512), 0.512)
        budget.observe(StepSize(1, 0), 0.004)
    tokens = [budget.tokens(1, NextPrompt(4000), waited_s) for waited_s in (0.0, 0.5, 1.0)]
    assert tokens == pytest.approx([96, 111, 126], abs=16)
    assert tokens[0] < tokens[2]


def test_rows_that_were_taken_for_dear_are_tried_again() -> None:
    """A delayed step with drafts must not end speculative decoding for good."""
    budget = make_budget()
    base_s, row_s = 0.004, 0.0004

    def step(factor: float = 1.0) -> int:
        """Run a step; draft eight tokens if a draft token with a probability of 0.8 pays off."""
        whole, row = sum(budget.cost_s), budget.cost_s[1]
        num_drafts = 8 if row < 0.7 * whole else 0
        budget.observe(StepSize(1, 0), factor * (base_s + row_s * (1 + num_drafts)), num_drafts=num_drafts)
        return num_drafts

    for _ in range(16):
        step()
    for _ in range(200):  # each draft token costs a whole step
        budget.observe(StepSize(1, 0), base_s * 9, num_drafts=8)
        budget.observe(StepSize(2, 0), base_s * 2)
    assert budget.cost_s[1] > 0.7 * sum(budget.cost_s)
    for _ in range(600):
        step()
    assert sum(step() > 0 for _ in range(100)) == 100
