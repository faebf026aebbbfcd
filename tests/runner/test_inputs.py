"""Plans as arrays: where each token is written, and which plans are refused."""

from __future__ import annotations

import numpy as np
import pytest

from tgi_asgi.runner.inputs import PlanError, StepInputs
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepRow
from tgi_asgi.types import SamplingParams

NO_IDS = np.zeros(4, np.int32)


@pytest.fixture
def inputs() -> StepInputs:
    return StepInputs(vocab_size=100, num_blocks=10, block_size=16, max_context=64, max_rows=4, max_tokens=40)


def test_decode_rows_and_chunks_are_laid_out_flat(inputs: StepInputs) -> None:
    rows = [
        StepRow(2, None, 17, [[4, 7]], samples=True),
        StepRow(0, [50, 51, 52], 15, [[9, 1, 3]], samples=False),
    ]
    batch = inputs.fill(rows, np.array([10, 11, 12, 13], np.int32))
    assert batch.ids.tolist() == [12, 50, 51, 52]
    assert batch.positions.tolist() == [17, 15, 16, 17]
    assert batch.slots.tolist() == [7 * 16 + 1, 9 * 16 + 15, 1 * 16, 1 * 16 + 1]
    assert batch.query_start.tolist() == [0, 1, 4]
    assert batch.context_len.tolist() == [18, 18]
    assert batch.block_tables.tolist() == [[[4, 7], [9, 1]]]


def test_a_step_leaves_nothing_to_the_next(inputs: StepInputs) -> None:
    inputs.fill([StepRow(0, list(range(40)), 0, [[1, 2, 3]], samples=True)], NO_IDS)
    batch = inputs.fill([StepRow(1, [5], 16, [[8, 9]], samples=True)], NO_IDS)
    assert (batch.ids.tolist(), batch.slots.tolist()) == ([5], [9 * 16])
    assert batch.query_start.tolist() == [0, 1]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(StepRow(0, [100], 0, [[1]], samples=True), id="token-too-large"),
        pytest.param(StepRow(0, [-1], 0, [[1]], samples=True), id="token-negative"),
        pytest.param(StepRow(0, [1 << 70], 0, [[1]], samples=True), id="token-huge"),
        pytest.param(StepRow(0, [], 0, [[1]], samples=True), id="no-token"),
        pytest.param(StepRow(0, [1], -1, [[1]], samples=True), id="start-negative"),
        pytest.param(StepRow(0, [1], 64, [[1, 2, 3, 4, 5]], samples=True), id="past-the-context"),
        pytest.param(StepRow(0, [1], 16, [[1]], samples=True), id="table-too-short"),
        pytest.param(StepRow(0, [1], 0, [[10]], samples=True), id="block-too-large"),
        pytest.param(StepRow(0, None, 16, [[1, -1]], samples=True), id="block-negative"),
        pytest.param(StepRow(0, None, 16, [[1, 1 << 70]], samples=True), id="block-huge"),
        pytest.param(StepRow(4, [1], 0, [[1]], samples=True), id="slot-too-large"),
        pytest.param(StepRow(-1, [1], 0, [[1]], samples=True), id="slot-negative"),
        pytest.param(StepRow(0, [1] * 41, 0, [[1, 2, 3]], samples=True), id="too-many-tokens"),
    ],
)
def test_rows_out_of_bounds_are_refused(inputs: StepInputs, row: StepRow) -> None:
    with pytest.raises(PlanError):
        inputs.fill([row], NO_IDS)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(StepRow("0", [1], 0, [[1]], samples=True), id="slot"),  # type: ignore[arg-type]
        pytest.param(StepRow(0, [1.0], 0, [[1]], samples=True), id="token"),  # type: ignore[list-item]
        pytest.param(StepRow(0, 1, 0, [[1]], samples=True), id="tokens"),  # type: ignore[arg-type]
        pytest.param(StepRow(0, [1], 0, [None], samples=True), id="blocks"),  # type: ignore[list-item]
    ],
)
def test_what_is_no_integer_is_a_type_error(inputs: StepInputs, row: StepRow) -> None:
    with pytest.raises(TypeError):
        inputs.fill([row], NO_IDS)


def test_two_rows_cannot_have_one_slot(inputs: StepInputs) -> None:
    with pytest.raises(PlanError, match="one slot"):
        inputs.fill(
            [StepRow(1, [1], 0, [[1]], samples=True), StepRow(1, [1], 0, [[2]], samples=True)], NO_IDS
        )


def test_any_sequence_serves_as_ids_and_blocks(inputs: StepInputs) -> None:
    batch = inputs.fill([StepRow(0, range(5, 8), 15, [range(3, 9)], samples=True)], NO_IDS)
    assert batch.ids.tolist() == [5, 6, 7]
    assert batch.block_tables.tolist() == [[[3, 4]]]


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(StepPlan(0, [], starts=[SlotStart(4, SamplingParams(), 0, [1])]), id="start-too-large"),
        pytest.param(StepPlan(0, [], copies=[(0, 10)]), id="copy-too-large"),
        pytest.param(StepPlan(0, [], copies=[(-1, 1)]), id="copy-negative"),
        pytest.param(StepPlan(0, [], copies=[(0, 1), (2, 1)]), id="copied-to-twice"),
        pytest.param(StepPlan(0, [], copies=[(0, 1), (1, 2)]), id="copied-to-and-from"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(inputs: StepInputs, plan: StepPlan) -> None:
    with pytest.raises(PlanError):
        inputs.check(plan)


@pytest.mark.parametrize("limit", [0, -1, 1 << 31])
def test_limits_are_positive_and_fit_the_arrays(limit: int) -> None:
    with pytest.raises(ValueError, match="limits must be in"):
        StepInputs(vocab_size=100, num_blocks=10, block_size=16, max_context=64, max_rows=4, max_tokens=limit)


@pytest.fixture
def windowed() -> StepInputs:
    """Return inputs for two groups of layers, one with a window of 20."""
    return StepInputs(
        vocab_size=100, num_blocks=10, block_size=16, max_context=96, max_rows=4, max_tokens=40,
        windows=(None, 20),
    )  # fmt: skip


def test_each_group_has_slots_and_a_table_of_its_own(windowed: StepInputs) -> None:
    """Check that block table entries before the window are ignored: position 60 sees 41 and later."""
    rows = [
        StepRow(0, [5, 6], 60, [[1, 2, 3, 4], [-1, 1 << 70, 8, 9]], samples=True),
        StepRow(1, [7], 3, [[5], [6]], samples=True),
    ]
    batch = windowed.fill(rows, NO_IDS)
    assert batch.slots.tolist() == [
        4 * 16 + 12,
        4 * 16 + 13,
        5 * 16 + 3,
        9 * 16 + 12,
        9 * 16 + 13,
        6 * 16 + 3,
    ]
    assert batch.block_tables.tolist() == [[[1, 2, 3, 4], [5, 0, 0, 0]], [[8, 8, 8, 9], [6, 0, 0, 0]]]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[1, 2, 3, 4]], "a block table for each of 2 groups, got 1"),
        ([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], "a block table for each of 2 groups, got 3"),
        ([[1, 2, 3, 4], [1, 2, 3]], "4 blocks are needed, got 3"),
        ([[1, 2, 3, 4], [1, 2, -1, 4]], r"a block must be in \[0, 10\), got -1"),
        ([[1, 2, 3, 4], [1, 2, 3, 10]], r"a block must be in \[0, 10\), got 10"),
        ([[-1, 2, 3, 4], [1, 2, 3, 4]], r"a block must be in \[0, 10\), got -1"),
    ],
)
def test_what_a_window_sees_is_checked(windowed: StepInputs, tables: list[list[int]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        windowed.fill([StepRow(0, [5], 60, tables, samples=True)], NO_IDS)
