"""How a step's rows lie in its inputs: padded to the shape of a graph, or as they come.

    3 decoding sequences and a prompt of 2 tokens; the first two need logits
                   tokens             rows of logits
    in a graph     a b c . . d d      a b c . . d      for 5 decodes: one row per sequence, . is padding
    without one    a b c d d          a b              only those that need them

Called by `CudaRunner`; knows no device.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from tgi_asgi.ops import DeviceRows
from tgi_asgi.runner.cuda_buffers import StepShape


class StepLayout(NamedTuple):
    """Where a step's rows and their logits are; valid until `rows` reads the next step."""

    shape: StepShape
    rows: DeviceRows
    needing: Sequence[int] | None  # plan rows that have a row of logits; None: every sequence has one

    def end(self, index: int) -> int:
        """Return the end of a plan row's tokens in the step."""
        return self.rows.end(index) + (self._gap if index >= self.rows.num_decodes else 0)

    def logits_rows(self, indices: Sequence[int]) -> Sequence[int]:
        """Return the rows of logits of plan rows that need logits, given in order."""
        if self.needing is None:
            first = bisect.bisect_left(indices, self.rows.num_decodes)
            gap = self._gap
            return [*indices[:first], *(index + gap for index in indices[first:])] if gap else indices
        at = {index: row for row, index in enumerate(self.needing)}
        return [at[index] for index in indices]

    @property
    def _gap(self) -> int:
        """The padding between rows that decode and others."""
        return self.shape.num_decodes - self.rows.num_decodes


def graph_layout(shape: StepShape, rows: DeviceRows) -> StepLayout:
    """Return the layout of a step in a graph's shape, whose decodes may be more than the step's."""
    shape = StepShape(*shape[:5], rows.has_adapters, rows.num_entries)
    return StepLayout(shape, rows, None if shape.num_rows else ())


def plain_layout(rows: DeviceRows, needing: Sequence[int]) -> StepLayout:
    """Return the layout of a step without a graph.

    Args:
        needing: Plan rows that need logits.
    """
    lens = tuple(rows.prompt_lens)
    longest = max((length for length, _ in lens), default=0)
    shape = StepShape(
        rows.num_tokens, rows.num_decodes + len(lens), len(needing), rows.num_decodes, longest,
        rows.has_adapters, rows.num_entries, lens,
    )  # fmt: skip
    return StepLayout(shape, rows, needing)
