"""How a step's rows lie in its inputs: padded to the shape of a graph, or as they come.

    3 decoding sequences and a prompt of 2 tokens; the first two need logits
                   tokens             rows of logits
    in a graph     a b c . . d d      a b c . . d      for 5 decodes: one row per sequence, . is padding
    without one    a b c d d          a b              only those that need them

Called by `CudaRunner`; knows no device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.plan import StepRow


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's rows and their logits are."""

    shape: StepShape  # has no columns yet, and no token has an adapter
    num_decodes: int  # plan rows that decode; they come first
    ends: Sequence[int]  # per plan row: the end of its tokens, without padding
    logits_tokens: list[int]  # per row of logits: its token
    logits_slots: list[int]  # per row of logits: the slot that samples from it; -1: none
    logits_rows: dict[int, int]  # by plan row that needs logits: its row of logits

    def end(self, index: int) -> int:
        """Return the end of a plan row's tokens in the step."""
        gap = self.shape.num_decodes - self.num_decodes
        return self.ends[index] + (gap if index >= self.num_decodes else 0)


def graph_layout(
    shape: StepShape, rows: Sequence[StepRow], needing: Collection[int], num_decodes: int, ends: Sequence[int]
) -> StepLayout:
    """Return the layout of a step in a graph's shape, whose decodes may be more than the step's.

    Args:
        needing: Indices of the rows that need logits; none if the graph computes no logits.
        num_decodes, ends: As in `StepLayout`.
    """
    if shape.num_rows == 0:
        return StepLayout(shape, num_decodes, ends, [], [], {})
    gap = shape.num_decodes - num_decodes  # padding after the last decoding sequence
    slots = _sampling_slots(rows)
    return StepLayout(
        shape,
        num_decodes,
        ends,
        logits_tokens=[*range(shape.num_decodes), *(end - 1 + gap for end in ends[num_decodes:])],
        logits_slots=[*slots[:num_decodes], *[-1] * gap, *slots[num_decodes:]],
        logits_rows={index: index if index < num_decodes else index + gap for index in needing},
    )


def plain_layout(
    rows: Sequence[StepRow], needing: Collection[int], num_decodes: int, ends: Sequence[int]
) -> StepLayout:
    """Return the layout of a step without a graph; the arguments are as in `graph_layout`."""
    lens = tuple((row.num_tokens, row.start + row.num_tokens) for row in rows[num_decodes:])
    longest = max((length for length, _ in lens), default=0)
    return StepLayout(
        StepShape(ends[-1], len(rows), len(needing), num_decodes, longest, 0, lens),
        num_decodes,
        ends,
        logits_tokens=[ends[index] - 1 for index in needing],
        logits_slots=_sampling_slots([rows[index] for index in needing]),
        logits_rows={index: at for at, index in enumerate(needing)},
    )


def _sampling_slots(rows: Sequence[StepRow]) -> list[int]:
    """Return the slot that samples after each row; -1: none."""
    return [row.slot if row.samples and row.pooling is None else -1 for row in rows]
