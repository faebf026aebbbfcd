"""How a GPU's steps with drafts are laid out, when they wait, and what counts of their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.support.kv import plain_limits
from tgi_asgi.ops import PlanError
from tgi_asgi.ops.cuda_kv import CudaKvFormat
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.runner.cuda_drafts import CudaDrafts, DraftedRows, LaidStep
from tgi_asgi.runner.cuda_sampler import CudaSampler
from tgi_asgi.runner.cuda_steps import CudaStepSpec
from tgi_asgi.runner.plan import DraftLimits, Sampled, SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.settings.speculation import Speculation
from tgi_asgi.types import SamplingParams

TEXT = [1, 2, 3, 4, 1, 2]  # 3 and 4 are likely to follow
SPARE = 4  # the first one


class Grammars:
    """Stands for the sampler: slots with a grammar, and how many drafts of each it allows."""

    def __init__(self, allowed: Mapping[int, int] | None = None) -> None:
        self.allowed = allowed or {}

    def certain(self, slot: int) -> Sequence[int]:
        return ()

    def masks_along(self, drafts: Mapping[int, list[int]], staging: Any) -> tuple[set[int], list[Any]]:
        for slot, count in self.allowed.items():
            del drafts[slot][count:]
        return set(self.allowed), ["masks"]

    def drafted(self, spares: Any, staging: Any) -> tuple[list[Any], list[Any]]:
        return [spares, "prepare"], ["accept"]


@pytest.fixture
def drafts() -> CudaDrafts:
    """Drafts of four slots, two of which have a text that repeats itself."""
    made = CudaDrafts(Speculation(3), num_slots=4, max_rows=16)
    texts = {0: TEXT, 1: [5, 6, 7], 2: TEXT}
    made.observe([start(slot, text) for slot, text in texts.items()], [], [])
    return made


def start(slot: int, text: list[int]) -> SlotStart:
    return SlotStart(slot, SamplingParams(), 0, text)


def row(slot: int, begin: int, stop: int | None, num_drafts: int = 0, **others: Any) -> StepRow:
    return StepRow(slot, None, begin, [[slot]], samples=True, stop=stop, num_drafts=num_drafts, **others)


def plan(*rows: StepRow) -> StepPlan:
    return StepPlan(7, list(rows), cost=(1.0, 0.0))


def laid(drafts: CudaDrafts, of: StepPlan, *, is_idle: bool = True, **allowed: Any) -> LaidStep:
    sampler = cast(CudaSampler, Grammars(**allowed))
    return drafts.lay_out(of, sampler, cast(Any, None), is_idle=is_idle)


def test_each_draft_is_a_row_of_its_own_in_a_spare_slot(drafts: CudaDrafts) -> None:
    adapter = object()
    found = laid(drafts, plan(row(0, 5, 8, 2), row(1, 2, 5, 2), row(2, 5, 8, 2, adapter=adapter)))
    assert found.plan.rows == [
        StepRow(0, None, 5, [[0]], samples=True),
        StepRow(SPARE, (3,), 6, [[0]], samples=True),
        StepRow(SPARE + 1, (4,), 7, [[0]], samples=True),
        StepRow(1, None, 2, [[1]], samples=True),
        StepRow(2, None, 5, [[2]], samples=True, adapter=adapter),
        StepRow(SPARE + 4, (3,), 6, [[2]], samples=True, adapter=adapter),
        StepRow(SPARE + 5, (4,), 7, [[2]], samples=True, adapter=adapter),
    ]
    spares = np.full((3, 12), -1)
    spares[:, [0, 1, 4, 5]] = [[0, 0, 2, 2], [1, 2, 1, 2], [3, 4, 3, 4]]
    commands: list[Any] = [*found.before, *found.after]
    assert commands == [spares.tolist(), "prepare", "masks", "accept"]
    assert (found.masked, found.starts) == ([], ())
    assert found.drafted == DraftedRows(
        [0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2], [-1, 3, 4, -1, -1, 3, 4], 3
    )


def test_a_grammar_cuts_drafts_and_masks_each_of_their_rows(drafts: CudaDrafts) -> None:
    found = laid(drafts, plan(row(0, 5, 8, 2), row(1, 2, 5, 2), row(2, 5, 8, 2)), allowed={1: 9, 2: 1})
    assert found.masked == [1, 2, SPARE + 4]
    found = laid(drafts, plan(row(0, 5, 8, 2)), allowed={0: 0})
    assert (found.masked, len(found.plan.rows)) == (None, 1), "as without drafts"


def test_rows_begin_where_their_slots_are_and_those_at_their_end_are_left_out(drafts: CudaDrafts) -> None:
    chunk = StepRow(3, [8, 9], 0, [[3]], samples=False)
    given = plan(row(0, 3, 5), row(1, 2, 3), row(2, 4, 9), chunk)
    found = laid(drafts, given)
    assert [(each.slot, each.start) for each in found.plan.rows] == [(1, 2), (2, 5), (3, 0)]
    assert found.plan.rows[-1] is chunk
    assert found.masked is None and found.drafted is not None
    computed = StepResult(7, [None] * 3, prompt_logprobs={2: []}, pooled={2: np.zeros(1, np.float32)})
    result, slots, kept = found.drafted.collect(computed, [0, 1], [Sampled(8), Sampled(9)])
    assert result.sampled == [None, Sampled(8), Sampled(9), None]
    assert (slots, [each.token_id for each in kept]) == ([1, 2], [8, 9])
    assert (list(result.prompt_logprobs), list(result.pooled)) == ([3], [3])
    assert (result.num_drafts, result.num_drafted_rows) == (0, 0)


@pytest.mark.parametrize("given", [row(0, 6, 9), row(0, 2, 4)], ids=["behind", "before"])
def test_a_slot_outside_of_its_row_is_refused(drafts: CudaDrafts, given: StepRow) -> None:
    with pytest.raises(PlanError, match="slot 0 is at 5"):
        laid(drafts, plan(given))


def test_more_drafts_than_spare_slots_are_refused(drafts: CudaDrafts) -> None:
    with pytest.raises(PlanError, match="at most 12 drafts"):
        laid(drafts, plan(row(1, 2, 15, 12), row(0, 5, 8, 2)))


def test_more_rows_than_a_step_has_room_for_are_refused(drafts: CudaDrafts) -> None:
    chunks = [StepRow(3, [8], at, [[3]], samples=False) for at in range(14)]
    assert len(laid(drafts, plan(row(0, 5, 8, 2), *chunks[1:])).plan.rows) == 16
    with pytest.raises(PlanError, match="at most 16 rows, drafts included, got 17"):
        laid(drafts, plan(row(0, 5, 8, 2), *chunks))


def test_a_step_whose_rows_are_where_they_were_planned_is_as_planned(drafts: CudaDrafts) -> None:
    given = plan(row(1, 2, 5, 2))
    found = laid(drafts, given)
    assert found.plan is given and found.drafted is None
    assert found.starts == ()
    given = StepPlan(7, [row(0, 5, 8, 2)], [start(1, [4])])
    found = laid(drafts, given, is_idle=False)
    assert found.plan is given and found.starts is given.starts, (
        "the drafter learns of them after the step before"
    )


def test_a_step_waits_for_tokens_that_decide_how_it_is_laid_out(drafts: CudaDrafts) -> None:
    assert drafts.must_wait(plan(row(1, 2, 5, 2), row(0, 5, 8, 2))), "drafts are likely"
    assert not drafts.must_wait(plan(row(1, 2, 5, 2))), "they are not"
    assert not drafts.must_wait(plan(row(0, 5, 8))), "nobody asks for any"
    restarted = plan(row(1, 2, 5, 2))
    restarted.starts = [start(1, TEXT)]
    assert drafts.must_wait(restarted), "of another text than the drafter knows"
    drafts.are_in_flight = True
    assert drafts.must_wait(plan(row(1, 2, 5)))


def test_what_follows_a_wrong_draft_does_not_count() -> None:
    rows = DraftedRows([0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 6, 6, 8, 8], [-1, 1, 0, -1, 0, -1, 5], 3)
    sampled = [
        *(Sampled(1), Sampled(7), Sampled(8)),
        *(Sampled(0), Sampled(9)),
        *(Sampled(5, is_finite=False), Sampled(6)),
    ]
    result, slots, kept = rows.collect(StepResult(1, [None] * 7), range(7), sampled)
    assert result.sampled == [sampled[0], sampled[3], sampled[5]]
    assert result.draft_samples == {0: [sampled[1]], 1: [sampled[4]]}
    assert slots == [4, 4, 6, 6, 8]
    assert kept == [sampled[0], sampled[1], sampled[3], sampled[4], sampled[5]]
    assert (result.num_drafts, result.num_drafted_rows) == (4, 3)


def test_no_step_that_is_planned_has_more_rows_than_there_is_room_for() -> None:
    def most(num_drafts: int, batch_size: int, step_tokens: int = 4096) -> tuple[int, int]:
        limits = plain_limits(max_sequences=batch_size, max_tokens=step_tokens, max_context=256)
        how = Speculation(num_drafts)
        spec = CudaStepSpec(limits, CudaModes(), CudaKvFormat(16, torch.float16), how)
        max_rows = spec.step_limits.max_rows
        assert spec.largest.num_rows == spec.step_limits.max_sequences == max_rows
        return max_rows, CudaDrafts(how, num_slots=batch_size, max_rows=max_rows).num_spares

    assert most(8, 4) == (36, 32)
    assert most(8, 64) == (96, 64)
    assert most(1, 64) == (128, 64)
    assert most(8, 256) == (256, 64)
    assert most(8, 4, step_tokens=20) == (20, 32)
    limits = DraftLimits(8, 64)
    assert [limits.for_rows(count) for count in (1, 8, 9, 32, 33)] == [8, 8, 7, 2, 0]
    assert [limits.for_rows(4, room) for room in (32, 31, 7, 0, -1)] == [8, 7, 0, 0, 0]
