from __future__ import annotations

import math
import random

import pytest

from tgi_asgi.engine.step_time import StepSize, StepTime


def test_nothing_is_known_at_first() -> None:
    time = StepTime()
    assert time.predict_s(StepSize(8, 100)) == 0.0
    assert not time.knows_prompts
    time.observe(StepSize(1, 0), 0.004)
    assert not time.knows_prompts
    time.observe(StepSize(0, 10), 0.02)
    assert time.knows_prompts


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_a_burst_of_mixed_steps_teaches_all_three(scale: float) -> None:
    """No step of the burst decodes alone: rows grow and chunks shrink, as when 64 prompts arrive at once."""
    base, row, token = 0.003 * scale, 0.0007 * scale, 0.0004 * scale
    time = StepTime()
    time.observe(StepSize(0, 100), base + 100 * token)  # an earlier request
    for _ in range(30):
        time.observe(StepSize(1, 0), base + row)
    rng = random.Random(1)
    for num_rows in range(1, 64):
        tokens = 110 - num_rows
        noise = rng.uniform(0.97, 1.03)
        time.observe(StepSize(num_rows, tokens), (base + num_rows * row + tokens * token) * noise)
    assert time.predict_s(StepSize(64, 0)) == pytest.approx(base + 64 * row, rel=0.15)
    assert time.prompt_s(1, 0) == pytest.approx(token, rel=0.15)


def test_it_follows_a_machine_that_slows_down() -> None:
    time = StepTime()
    for pace in (1.0, 2.0):
        for step in range(60):
            tokens = 0 if step % 4 else 128
            time.observe(StepSize(16, tokens), (0.013 + tokens * 0.0004) * pace)
    assert time.predict_s(StepSize(16, 0)) == pytest.approx(0.026, rel=0.1)
    assert time.predict_s(StepSize(16, 128)) == pytest.approx(0.1284, rel=0.1)


def test_a_stall_is_no_trend() -> None:
    time = StepTime()
    for _ in range(50):
        time.observe(StepSize(4, 0), 0.005)
    time.observe(StepSize(4, 0), 5.0)
    assert time.predict_s(StepSize(4, 0)) < 0.015


def test_steps_of_one_size_for_hours_do_not_upset_it() -> None:
    time = StepTime()
    time.observe(StepSize(0, 256), 0.1)
    for _ in range(100_000):
        time.observe(StepSize(8, 0), 0.008)
    assert time.predict_s(StepSize(8, 0)) == pytest.approx(0.008, rel=0.05)
    time.observe(StepSize(16, 0), 0.012)
    time.observe(StepSize(8, 256), 0.108)
    assert time.predict_s(StepSize(16, 256)) == pytest.approx(0.112, rel=0.15)
    assert (
        min(
            time.predict_s(StepSize(0, 0)),
            time.predict_s(StepSize(100, 0)),
            time.predict_s(StepSize(0, 10_000)),
        )
        >= 0.0
    )


def test_what_a_prompt_reads_is_blamed_on_neither_tokens_nor_rows() -> None:
    """After a long prompt in parts, a short one is as cheap as its tokens, and a decode step as its rows."""
    base, row, token, pair = 0.004, 0.0015, 0.00045, 1.9e-7
    time, rng = StepTime(), random.Random(2)
    at = 0
    for tokens in [128, 768] + [256, 48, 64, 24] * 12:
        num_rows = int(tokens < 256)
        size = StepSize(num_rows, tokens, tokens * (at + tokens / 2))
        duration_s = base + num_rows * row + tokens * token + size.num_pairs * pair
        time.observe(size, duration_s * rng.uniform(0.97, 1.03))
        at += tokens
    assert time.prompt_s(24, 0) == pytest.approx(24 * token, rel=0.15)
    assert time.prompt_s(256, at) == pytest.approx(256 * (token + (at + 128) * pair), rel=0.1)
    assert time.predict_s(StepSize(1, 0)) == pytest.approx(base + row, rel=0.5)


@pytest.mark.parametrize("num_before", [0, 5000])
def test_as_many_prompt_tokens_are_found_as_take_a_time(num_before: int) -> None:
    time = StepTime()
    assert time.prompt_tokens(0.4, num_before) == math.inf
    for tokens in (128, 512, 512):
        time.observe(StepSize(0, tokens, tokens * 2000), 0.01 + tokens * (0.0004 + 2000 * 2e-7))
    assert time.prompt_s(time.prompt_tokens(0.4, num_before), num_before) == pytest.approx(0.4)
