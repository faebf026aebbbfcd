"""The operator `sample`: one token a row of logits, with its log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.sample_state import SampleState


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What was drawn; fresh tensors, one entry a row of the logits."""

    token_ids: Tensor  # [n_rows] int32
    is_finite: Tensor  # [n_rows] bool; False: the logits held NaN or +inf, or nothing could be drawn
    logprobs: Tensor  # [n_rows] float32, of the drawn token; NaN where the slot wants none
    top_ids: Tensor  # [n_rows, max_top] int32, most probable first, lowest id first on ties
    top_logprobs: Tensor  # [n_rows, max_top] float32
    num_top: Tensor  # [n_rows] int32: how many of a row's top entries are filled

    @classmethod
    def allocate(cls, rows: int, max_top: int) -> SampleResult:
        """Make room for a draw from `rows` rows, not filled yet."""
        return cls(
            token_ids=torch.empty(rows, dtype=torch.int32),
            is_finite=torch.empty(rows, dtype=torch.bool),
            logprobs=torch.empty(rows),
            top_ids=torch.empty(rows, max_top, dtype=torch.int32),
            top_logprobs=torch.empty(rows, max_top),
            num_top=torch.empty(rows, dtype=torch.int32),
        )


def sample(logits: Tensor, state: SampleState, slots: Tensor, *, mask: Tensor | None = None) -> SampleResult:
    """Draw one token for each row of logits [n_rows, vocab] float32, by the parameters of its slot.

    In order: penalties (repetition, frequency, presence), bias, masked ids, `mask`, temperature, top-k, top-p
    over the renormalised top-k set, min-p, typical-p, draw. Cut-offs keep whole ties. The draw is Gumbel-max
    (as its equal, the race of exponentials) with Philox4x32-10, key (seed, choice), counter (position, token
    id): it depends on nothing else in the batch. Temperature 0 is the argmax after the masks, lowest id on
    ties.

    Log-probabilities describe, by the slot's mode, the softmax of the raw logits, or the distribution that
    was drawn from (where greedy: the softmax after penalties, bias and masks); ids outside of it are not
    listed.

    Args:
        logits: not changed.
        state: of each slot named, the position, the last id and the counts move on by the token drawn. A
            row that is not finite draws id 0, and its slot stays as it was.
        slots: [n_rows] int32, all different.
        mask: [n_rows, ceil(vocab / 32)] int32, bit i % 32 of word i / 32 set where token i is allowed.

    Raises:
        RuntimeError: shapes do not fit, or a slot is out of range or named twice.
    """
    result = SampleResult.allocate(logits.shape[0], state.max_top(slots))
    torch.ops.tgi.sample(
        logits, slots, *state.tensors, mask,
        state.scratch(_C.num_threads()), result.token_ids, result.is_finite, result.logprobs,
        result.top_ids, result.top_logprobs, result.num_top,
    )  # fmt: skip
    return result


@meta_of("sample")
def _sample_meta(
    logits: Tensor,
    slots: Tensor,
    records: Tensor,
    counts: Tensor,
    biased_ids: Tensor,
    biased_values: Tensor,
    masked_ids: Tensor,
    mask: Tensor | None,
    scratch: Tensor,
    token_ids: Tensor,
    is_finite: Tensor,
    logprobs: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    num_top: Tensor,
) -> None:
    require(slots.shape == (logits.shape[0],))
