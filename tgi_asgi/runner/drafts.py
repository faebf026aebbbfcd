"""Drafts: which tokens a step computes behind a row's own, for the steps that Python lays out.

The drafter itself is the extension's, where steps of rows alone ask it by themselves; see
csrc/cpu/drafter.h for how it guesses, and docs/drafts.md for the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tgi_asgi import ops
from tgi_asgi.runner.plan import DraftLimits, Sampled, SlotStart, StepPlan
from tgi_asgi.settings import Speculation

MOST_PER_STEP = 64  # of all rows: there is a row of logits for each


def most_drafts(how: Speculation | None) -> int:
    """Return how many drafts a row has at the most."""
    return 0 if how is None else min(how.num_tokens, MOST_PER_STEP)


class SlotDrafts:
    """What is drafted for the sequences of all slots. For the runner's thread.

    Attributes:
        limits: how many drafts steps have.
        native: the drafter, which `StepQueue` asks, too.
    """

    def __init__(self, how: Speculation, num_slots: int) -> None:
        self.limits = DraftLimits(most_drafts(how), MOST_PER_STEP)
        self.native = ops.Drafter(num_slots=num_slots, shortest=how.shortest, longest=how.longest)

    def start(self, start: SlotStart) -> None:
        """Give a slot to its new sequence."""
        self.native.start(start.slot, np.array([*start.prompt_ids, *start.output_ids], np.int32))

    def choose(
        self, plan: StepPlan, starts: Sequence[int], certain: Callable[[int], Sequence[int]]
    ) -> list[list[int]]:
        """Return the drafts of each row; an empty list where no row may have any.

        Args:
            starts: where each row begins.
            certain: says what must follow in a slot, where its grammar knows.
        """
        wishes: list[tuple[int, int, Sequence[int]]] = []
        wishing: list[int] = []
        for index, row in enumerate(plan.rows):
            room = row.end - starts[index] - 1
            if row.num_drafts and room > 0:
                wishes.append((row.slot, min(row.num_drafts, room), certain(row.slot)))
                wishing.append(index)
        if not wishes:
            return []
        base, token = plan.cost
        num_tokens = sum(row.num_tokens for row in plan.rows)
        chosen = self.native.choose(wishes, base=base, token=token, num_tokens=num_tokens)
        drafts: list[list[int]] = [[] for _ in plan.rows]
        for index, found in zip(wishing, chosen, strict=True):
            drafts[index] = found
        return drafts

    def tell(self, slots: Iterable[int], drawn: Iterable[Sampled]) -> None:
        """Take what the slots' sequences have drawn, in order."""
        for slot, sampled in zip(slots, drawn, strict=True):
            if sampled.is_finite:
                self.native.append(slot, sampled.token_id)
