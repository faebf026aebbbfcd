"""A plan's rows as the flat arrays that operators read: checked, and written into buffers made once.

Everything that reaches C++ passes here: each integer of a plan is checked against the model and the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.models.batch import Batch
from tgi_asgi.ops import AttentionTables
from tgi_asgi.runner.plan import StepPlan, StepRow


class PlanError(ValueError):
    """Raised when a plan names what does not exist: the engine's mistake, never a client's."""


class StepInputs:
    """Fixed buffers for the largest step, filled anew for each.

    Args:
        vocab_size, num_blocks, max_context: bounds of token ids, block ids and positions.
        max_rows: sequences in a step, and the bound of slots.
        max_tokens: tokens in a step.
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
    ) -> None:
        self._vocab_size = vocab_size
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_context = max_context
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int64)
        self._query_start = np.zeros(max_rows + 1, np.int32)
        self._context_len = np.zeros(max_rows, np.int32)
        self._block_table = np.zeros((max_rows, -(-max_context // block_size)), np.int32)
        self._tensors = {
            name: torch.from_numpy(getattr(self, f"_{name}"))
            for name in ("ids", "positions", "slots", "query_start", "context_len", "block_table")
        }

    def check(self, plan: StepPlan) -> None:
        """Check what `fill` does not: sizes, slots, and the blocks to copy."""
        slots = [row.slot for row in plan.rows]
        if len(set(slots)) != len(slots):
            raise PlanError("two rows of a step have one slot")
        for slot in (*slots, *(start.slot for start in plan.starts)):
            _check_range("slot", slot, self._max_rows)
        num_tokens = sum(row.num_tokens for row in plan.rows)
        if num_tokens > self._max_tokens:
            raise PlanError(f"a step has at most {self._max_tokens} tokens, got {num_tokens}")
        sources, targets = [pair[0] for pair in plan.copies], [pair[1] for pair in plan.copies]
        for block in (*sources, *targets):
            _check_range("block", block, self._num_blocks)
        if len(set(targets)) != len(targets) or set(targets) & set(sources):
            raise PlanError("a block is copied to twice, or both from and to")

    def fill(self, rows: Sequence[StepRow], last_ids: Sequence[int] | np.ndarray) -> Batch:
        """Write the rows' arrays; a row without token ids takes its slot's `last_ids`."""
        at = 0
        for index, row in enumerate(rows):
            stop = at + row.num_tokens
            if row.token_ids is None:
                self._ids[at] = last_ids[row.slot]
            else:
                self._ids[at:stop] = _integers("token id", row.token_ids, self._vocab_size)
            self._place(index, row, at, stop)
            at = stop
        return self._batch(len(rows), at)

    def _place(self, index: int, row: StepRow, at: int, stop: int) -> None:
        """Write where a row's tokens are: in its sequence, in the step, and in the pool."""
        context = row.start + stop - at
        if row.start < 0 or stop == at or context > self._max_context:
            raise PlanError(
                f"a row of {stop - at} tokens at {row.start} is not within the context of {self._max_context}"
            )
        num_blocks = -(-context // self._block_size)
        if len(row.block_table) < num_blocks:
            raise PlanError(f"{context} tokens need {num_blocks} blocks, got {len(row.block_table)}")
        blocks = _integers("block", row.block_table[:num_blocks], self._num_blocks)
        self._block_table[index, :num_blocks] = blocks
        self._context_len[index] = context
        self._query_start[index + 1] = stop
        if stop - at == 1:  # decode rows, by far the most: numpy's calls would take longer than the rest
            self._positions[at] = row.start
            self._slots[at] = int(blocks[-1]) * self._block_size + row.start % self._block_size
            return
        positions = np.arange(row.start, context)
        self._positions[at:stop] = positions
        self._slots[at:stop] = (
            blocks[positions // self._block_size].astype(np.int64) * self._block_size
            + positions % self._block_size
        )

    def _batch(self, num_rows: int, num_tokens: int) -> Batch:
        def first(name: str, count: int) -> Tensor:
            return self._tensors[name][:count]

        return Batch(
            ids=first("ids", num_tokens),
            positions=first("positions", num_tokens),
            slots=first("slots", num_tokens),
            tables=AttentionTables(
                first("query_start", num_rows + 1),
                first("context_len", num_rows),
                first("block_table", num_rows),
            ),
        )


def _check_range(name: str, value: int, stop: int) -> None:
    if not 0 <= value < stop:
        raise PlanError(f"a {name} must be in [0, {stop}), got {value}")


def _integers(name: str, values: Sequence[int], stop: int) -> np.ndarray:
    """Return values as an array, each in [0, stop)."""
    array = np.asarray(values, dtype=np.int64)
    if array.ndim != 1 or (array.size and not 0 <= array.min() <= array.max() < stop):
        raise PlanError(f"each {name} must be in [0, {stop})")
    return array
