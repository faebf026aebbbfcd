"""Draft tokens: what a step computes after a row's own tokens, for steps that Python lays out.

The drafter itself is native. Steps that run without Python ask it directly. csrc/cpu/drafter.h describes how
it guesses, docs/drafts.md the whole mechanism.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tgi_asgi import ops
from tgi_asgi.runner.plan import DraftLimits, Sampled, SlotStart, StepPlan
from tgi_asgi.settings import Settings
from tgi_asgi.settings.speculation import Speculation

if TYPE_CHECKING:
    from tgi_asgi.models.family import Model
    from tgi_asgi.models.generic.model import GenericModel

logger = logging.getLogger(__name__)

MAX_DRAFTS_PER_STEP = 64  # over all rows: each draft needs a row of logits


def max_drafts_per_row(how: Speculation | None) -> int:
    """Return the maximum number of drafts per row."""
    return 0 if how is None else min(how.num_tokens, MAX_DRAFTS_PER_STEP)


def with_drafts(limits: ops.StepLimits, how: Speculation | None) -> ops.StepLimits:
    """Return the limits of a CPU's program: each draft that a step may have needs a row of logits."""
    return limits if how is None else replace(limits, max_rows=limits.max_rows + MAX_DRAFTS_PER_STEP)


def draft_limits(how: Speculation) -> DraftLimits:
    """Return the maximum numbers of drafts per row and per step."""
    return DraftLimits(max_drafts_per_row(how), MAX_DRAFTS_PER_STEP)


def num_spares(how: Speculation, num_slots: int) -> int:
    """Return how many spare slots a GPU has, one for each draft of a step."""
    limits = draft_limits(how)
    return min(limits.per_step, limits.per_row * num_slots)


def speculation_of(model: Model | GenericModel, settings: Settings) -> Speculation | None:
    """Return how to draft tokens; None, with a warning, if drafts cannot be computed safely."""
    speculation = settings.speculation
    if speculation is None or not model.config.generates:
        return None
    reason = _why_no_drafts(model)
    if reason is None:
        return speculation
    logger.warning("speculation is disabled for %s: %s", model.config.architecture, reason)
    return None


def _why_no_drafts(model: Model | GenericModel) -> str | None:
    """Return why drafts could change a model's text or not be undone; None if they are safe."""
    if model.kind == "native":
        return None
    if model.config.has_states:
        return "its state of a sequence cannot be undone token by token"
    if not model.is_batch_invariant:
        return "its logits depend on what else is computed"
    if model.config.vision is not None:
        return "it accepts images"
    return None


class SlotDrafts:
    """The draft tokens of all slots' sequences.

    For use on the runner's thread; of a CUDA runner, on both of its threads, because Python's calls of the
    native drafter hold the GIL.

    Attributes:
        limits: Maximum numbers of drafts per row and per step.
        native: The native drafter, which `StepQueue` also asks.
    """

    def __init__(self, how: Speculation, num_slots: int) -> None:
        self.limits = draft_limits(how)
        self.native = ops.Drafter(num_slots=num_slots, shortest=how.shortest, longest=how.longest)

    def start(self, start: SlotStart) -> None:
        """Reset a slot's history to the tokens of its new sequence."""
        self.native.start(start.slot, np.array([*start.prompt_ids, *start.output_ids], np.int32))

    def choose(
        self, plan: StepPlan, starts: Sequence[int], certain: Callable[[int], Sequence[int]]
    ) -> list[list[int]]:
        """Return each row's drafts, or an empty list if no row may have any.

        Args:
            starts: Position at which each row begins.
            certain: Returns the tokens that a slot's grammar forces next, if any.
        """
        requests: list[tuple[int, int, Sequence[int]]] = []
        wishing: list[int] = []
        for index, row in enumerate(plan.rows):
            room = row.end - starts[index] - 1
            if row.num_drafts and room > 0:
                requests.append((row.slot, min(row.num_drafts, room), certain(row.slot)))
                wishing.append(index)
        if not requests:
            return []
        base, token = plan.cost
        num_tokens = sum(row.num_tokens for row in plan.rows)
        chosen = self.native.choose(requests, base=base, token=token, num_tokens=num_tokens)
        drafts: list[list[int]] = [[] for _ in plan.rows]
        for index, found in zip(wishing, chosen, strict=True):
            drafts[index] = found
        return drafts

    def append(self, slots: Iterable[int], samples: Iterable[Sampled]) -> None:
        """Append the tokens sampled for the slots, in order."""
        for slot, sampled in zip(slots, samples, strict=True):
            if sampled.is_finite:
                self.native.append(slot, sampled.token_id)
