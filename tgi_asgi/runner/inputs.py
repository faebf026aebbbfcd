"""A plan's rows as the flat arrays that operators read: checked, and written into buffers made once.

Everything that reaches C++ passes here: each integer of a plan is checked against the model and the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.models.batch import Batch
from tgi_asgi.ops import AttentionTables
from tgi_asgi.runner.plan import StepPlan, StepRow

Integers = npt.NDArray[Any]


# Up to which plain Python beats numpy: a step leaves nothing in the caches, and numpy's calls run a lot of
# code once (16 rows: 0.11 ms, by numpy 0.23; 64: 0.26 and 0.38).
_FEW_ROWS = 64


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

    def fill(self, rows: Sequence[StepRow], last_ids: Integers) -> Batch:
        """Write the rows' arrays; a row without token ids takes its slot's `last_ids`.

        Raises:
            PlanError: an id, a position or a block is out of bounds.
        """
        if len(rows) <= _FEW_ROWS and all(row.num_tokens == 1 for row in rows):
            return self._fill_decodes(rows, last_ids)
        starts = np.array([row.start for row in rows], np.int64)
        counts = np.array([row.num_tokens for row in rows], np.int64)
        contexts = starts + counts
        if starts.min() < 0 or counts.min() < 1 or contexts.max() > self._max_context:
            raise PlanError(f"a row has no token, or leaves the context of {self._max_context}")
        stops = np.cumsum(counts)
        num_tokens = int(stops[-1])
        self._query_start[1 : len(rows) + 1] = stops
        self._context_len[: len(rows)] = contexts
        positions = np.arange(num_tokens) + np.repeat(starts - (stops - counts), counts)
        self._positions[:num_tokens] = positions
        self._ids[:num_tokens] = self._token_ids(rows, last_ids)
        self._place(rows, -(-contexts // self._block_size), positions, counts)
        return self._batch(len(rows), num_tokens)

    def _fill_decodes(self, rows: Sequence[StepRow], last_ids: Integers) -> Batch:
        """Write a few rows of one token each, one by one."""
        size = self._block_size
        for index, row in enumerate(rows):
            start, table = row.start, row.block_table
            num_blocks = start // size + 1
            token = int(last_ids[row.slot]) if row.token_ids is None else row.token_ids[0]
            if not 0 <= start < self._max_context:
                raise PlanError(f"a row has no token, or leaves the context of {self._max_context}")
            if len(table) < num_blocks:
                raise PlanError(f"{num_blocks} blocks are needed, got {len(table)}")
            _check_range("token id", token, self._vocab_size)
            blocks = table[:num_blocks]
            _check_range("block", min(blocks), self._num_blocks)
            _check_range("block", max(blocks), self._num_blocks)
            self._ids[index] = token
            self._positions[index] = start
            self._slots[index] = table[num_blocks - 1] * size + start % size
            self._query_start[index + 1] = index + 1
            self._context_len[index] = start + 1
            self._block_table[index, :num_blocks] = blocks
        return self._batch(len(rows), len(rows))

    def _token_ids(self, rows: Sequence[StepRow], last_ids: Integers) -> Integers:
        last: list[int] = last_ids.tolist()
        ids: list[int] = []
        for row in rows:
            if row.token_ids is None:
                ids.append(last[row.slot])
            else:
                ids.extend(row.token_ids)
        return _integers("token id", ids, self._vocab_size)

    def _place(
        self, rows: Sequence[StepRow], num_blocks: Integers, positions: Integers, counts: Integers
    ) -> None:
        """Write the block tables, and where in the pool each token's keys and values go."""
        flat: list[int] = []
        for row, count in zip(rows, num_blocks.tolist(), strict=True):
            if len(row.block_table) < count:
                raise PlanError(f"{count} blocks are needed, got {len(row.block_table)}")
            flat.extend(row.block_table[:count])
        blocks = _integers("block", flat, self._num_blocks)
        firsts = np.cumsum(num_blocks) - num_blocks  # each table's place in `blocks`
        columns = np.arange(blocks.size) - np.repeat(firsts, num_blocks)
        self._block_table[np.repeat(np.arange(len(rows)), num_blocks), columns] = blocks
        index, offset = np.divmod(positions, self._block_size)
        self._slots[: positions.size] = blocks[index + np.repeat(firsts, counts)] * self._block_size + offset

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


def _integers(name: str, values: Sequence[int], stop: int) -> Integers:
    """Return values as an array, each in [0, stop)."""
    array = np.array(values, np.int64)
    if array.size and not 0 <= array.min() <= array.max() < stop:
        raise PlanError(f"each {name} must be in [0, {stop})")
    return array
