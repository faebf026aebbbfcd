"""How a step's rows lie in its inputs: padded to the shape of a graph, or as they come.

    3 decoding sequences and a prompt of 2 tokens; the first two sample
                   tokens             rows of logits
    in a graph     a b c . . d d      a b c . . d      for 5 decodes: one row per sequence, . is padding
    without one    a b c d d          a b              only those that sample

Called by `CudaRunner`; knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.plan import StepRow


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's rows and their logits are."""

    shape: StepShape  # has no columns yet, and no token has an adapter
    logits_tokens: list[int]  # per row of logits: its token
    logits_slots: list[int]  # per row of logits: the slot that samples from it; -1: none
    sample_rows: list[int]  # per plan row that samples: its row of logits


def graph_layout(
    shape: StepShape, rows: Sequence[StepRow], sampling: Sequence[int], num_decodes: int, ends: Sequence[int]
) -> StepLayout:
    """Return the layout of a step in a graph's shape, whose decodes may be more than the step's.

    Args:
        sampling: Indices of the rows that sample.
        num_decodes: Number of rows that decode; they come first.
        ends: Per row: the end of its tokens, without padding.
    """
    gap = shape.num_decodes - num_decodes  # padding after the last decoding sequence
    slots = [row.slot if row.samples else -1 for row in rows]
    return StepLayout(
        shape,
        logits_tokens=[*range(shape.num_decodes), *(end - 1 + gap for end in ends[num_decodes:])],
        logits_slots=[*slots[:num_decodes], *[-1] * gap, *slots[num_decodes:]],
        sample_rows=[index if index < num_decodes else index + gap for index in sampling],
    )


def plain_layout(
    rows: Sequence[StepRow], sampling: Sequence[int], num_decodes: int, ends: Sequence[int]
) -> StepLayout:
    """Return the layout of a step without a graph; the arguments are as in `graph_layout`."""
    lens = tuple((row.num_tokens, row.start + row.num_tokens) for row in rows[num_decodes:])
    longest = max((length for length, _ in lens), default=0)
    return StepLayout(
        StepShape(ends[-1], len(rows), len(sampling), num_decodes, longest, 0, lens),
        logits_tokens=[ends[index] - 1 for index in sampling],
        logits_slots=[rows[index].slot for index in sampling],
        sample_rows=list(range(len(sampling))),
    )
