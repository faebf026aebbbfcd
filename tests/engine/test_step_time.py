from __future__ import annotations

import random

import pytest

from tgi_asgi.engine.step_time import StepTime


def test_nothing_is_known_at_first() -> None:
    time = StepTime()
    assert time.predict_s(8, 100) == 0.0
    assert time.token_s is None
    time.observe(1, 0, 0.004)
    assert time.token_s is None
    time.observe(0, 10, 0.02)
    assert time.token_s is not None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_a_burst_of_mixed_steps_teaches_all_three(scale: float) -> None:
    """No step of the burst decodes alone: rows grow and chunks shrink, as when 64 prompts arrive at once."""
    base, row, token = 0.003 * scale, 0.0007 * scale, 0.0004 * scale
    time = StepTime()
    time.observe(0, 100, base + 100 * token)  # an earlier request
    for _ in range(30):
        time.observe(1, 0, base + row)
    rng = random.Random(1)
    for num_rows in range(1, 64):
        tokens = 110 - num_rows
        noise = rng.uniform(0.97, 1.03)
        time.observe(num_rows, tokens, (base + num_rows * row + tokens * token) * noise)
    assert time.predict_s(64, 0) == pytest.approx(base + 64 * row, rel=0.15)
    assert time.token_s == pytest.approx(token, rel=0.15)


def test_it_follows_a_machine_that_slows_down() -> None:
    time = StepTime()
    for pace in (1.0, 2.0):
        for step in range(60):
            tokens = 0 if step % 4 else 128
            time.observe(16, tokens, (0.013 + tokens * 0.0004) * pace)
    assert time.predict_s(16, 0) == pytest.approx(0.026, rel=0.1)
    assert time.predict_s(16, 128) == pytest.approx(0.1284, rel=0.1)


def test_a_stall_is_no_trend() -> None:
    time = StepTime()
    for _ in range(50):
        time.observe(4, 0, 0.005)
    time.observe(4, 0, 5.0)
    assert time.predict_s(4, 0) < 0.015


def test_steps_of_one_size_for_hours_do_not_upset_it() -> None:
    time = StepTime()
    time.observe(0, 256, 0.1)
    for _ in range(100_000):
        time.observe(8, 0, 0.008)
    assert time.predict_s(8, 0) == pytest.approx(0.008, rel=0.05)
    time.observe(16, 0, 0.012)
    time.observe(8, 256, 0.108)
    assert time.predict_s(16, 256) == pytest.approx(0.112, rel=0.15)
    assert min(time.predict_s(0, 0), time.predict_s(100, 0), time.predict_s(0, 10_000)) >= 0.0
