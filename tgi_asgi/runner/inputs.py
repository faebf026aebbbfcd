"""Turns a plan's rows into the flat arrays that operators read, and checks them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tgi_asgi.ops import FlatRows, PlanError, RowLimits, flatten_rows
from tgi_asgi.runner.plan import RunnerTraits, StepPlan, StepRow

__all__ = ["PlanError", "StepInputs"]


class StepInputs:
    """Lays out steps and checks each integer of a plan against the model's and the pool's bounds.

    Args:
        vocab_size, num_blocks, max_context: Bounds of token ids, block ids and positions.
        max_rows: Maximum number of sequences in a step, and the bound of slots.
        max_tokens: Maximum number of tokens in a step.
        windows: As in `RunnerTraits.windows`.
        num_kept_states: Bound of the places of kept recurrent states.

    Attributes:
        limits: The same bounds, for `ops.StepQueue`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_blocks: int,
        block_size: int,
        max_context: int,
        max_rows: int,
        max_tokens: int,
        windows: Sequence[int | None] = (None,),
        num_kept_states: int = 0,
    ) -> None:
        self._num_blocks, self._max_rows = num_blocks, max_rows
        self.limits = RowLimits(
            vocab_size=vocab_size,
            num_blocks=num_blocks,
            block_size=block_size,
            max_context=max_context,
            max_rows=max_rows,
            max_tokens=max_tokens,
            windows=windows,
            num_kept_states=num_kept_states,
        )

    @classmethod
    def of(
        cls, traits: RunnerTraits, vocab_size: int, max_context: int, *, num_spares: int = 0
    ) -> StepInputs:
        """Return the inputs of a runner's steps; `num_spares` slots follow those of its sequences."""
        return cls(
            vocab_size=vocab_size, num_blocks=traits.num_blocks, block_size=traits.block_size,
            max_context=max_context, max_rows=traits.max_batch_size + num_spares,
            max_tokens=traits.max_step_tokens, windows=traits.windows,
            num_kept_states=traits.num_kept_states or 0,
        )  # fmt: skip

    def check(self, plan: StepPlan) -> None:
        """Check the slots that start, and the blocks to copy.

        Raises:
            PlanError: if one is out of bounds, or copies depend on each other.
        """
        for start in plan.starts:
            _check_range("slot", start.slot, self._max_rows)
        sources, targets = [pair[0] for pair in plan.copies], [pair[1] for pair in plan.copies]
        for block in (*sources, *targets):
            _check_range("block", block, self._num_blocks)
        if len(set(targets)) != len(targets) or set(targets) & set(sources):
            raise PlanError("a block is copied to twice, or both from and to")

    def fill(
        self,
        rows: Sequence[StepRow],
        last_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int64] | None = None,
        drafts: Sequence[Sequence[int]] = (),
    ) -> FlatRows:
        """Return the rows as arrays; a row without token ids uses its slot's entry of `last_ids` [n_slots].

        Args:
            positions: Position of the token that each slot samples next, for rows that have a `stop`.
            drafts: Drafts of each row, or empty.

        Raises:
            PlanError: if an id, position, slot or block is out of bounds, or two rows have the same slot.
        """
        return flatten_rows(rows, self.limits, last_ids, positions, drafts)


def _check_range(name: str, value: int, stop: int) -> None:
    if not 0 <= value < stop:
        raise PlanError(f"a {name} must be in [0, {stop}), got {value}")
