"""Properties common to the operators with states of heads or channels: cutting a sequence changes no bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops import test_channel_scan, test_delta_rule, test_selective_scan
from tests.support.state_steps import (
    assert_chunking_keeps_bits,
    assert_kept_states_resume,
    assert_rejected_drafts_are_undone,
    assert_step_may_be_computed_again,
)

# Modules with `random_weight`, `random_text` and `steps_of`.
pytestmark = pytest.mark.parametrize(
    "operator",
    [test_delta_rule, test_selective_scan, test_channel_scan],
    ids=["delta_rule", "selective_scan", "channel_scan"],
)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_has_the_same_bits_in_any_steps_and_team(
    operator: Any, kernel_set: str, threads: int
) -> None:
    weight = operator.random_weight(3, 80, 3, 9)
    texts = [operator.random_text(weight, length) for length in (23, 11, 40)]
    assert_chunking_keeps_bits(lambda slots: operator.steps_of(weight, slots), texts, threads)


def test_a_step_may_be_computed_again(operator: Any) -> None:
    weight = operator.random_weight(2, 32, 1, 6)
    text, *wrong = (operator.random_text(weight, length) for length in (9, 1, 3))
    assert_step_may_be_computed_again(lambda slots: operator.steps_of(weight, slots), text, wrong)


@pytest.mark.parametrize("threads", [1, 3])
def test_kept_states_are_gone_on_with(operator: Any, threads: int) -> None:
    weight = operator.random_weight(3, 48, 3, 6)
    text = operator.random_text(weight, 12)
    assert_kept_states_resume(lambda slots: operator.steps_of(weight, slots), text, threads)


def test_drafts_are_taken_back(operator: Any) -> None:
    weight = operator.random_weight(2, 32, 1, 6)
    text, wrong = (operator.random_text(weight, length) for length in (12, 4))
    assert_rejected_drafts_are_undone(lambda slots: operator.steps_of(weight, slots), text, wrong)
