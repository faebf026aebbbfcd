"""The operator `sample`: one token a row of logits, with its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import _C
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
    # [n_rows] bool: False where another token was drawn than a draft before the row; None: nowhere.
    is_kept: Tensor | None = None

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[np.generic]]) -> SampleResult:
        """Wrap the arrays that the extension returns, in the order of the fields."""
        return cls(*map(torch.from_numpy, arrays))


def sample(
    logits: Tensor,
    state: SampleState,
    slots: Sequence[int],
    *,
    mask: npt.NDArray[np.int32] | None = None,
    drafts: Sequence[int] = (),
) -> SampleResult:
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
        slots: one a row, all different but for rows that follow drafts.
        mask: [n_rows, ceil(vocab / 32)] int32, bit i % 32 of word i / 32 set where token i is allowed.
        drafts: [n_rows] or empty: where it is not negative the row is the next of the slot of the row before,
            and its logits are those behind this token. It is drawn as if that one had been, and counts if so.

    Raises:
        ValueError: shapes do not fit, or a slot is out of range or named twice.
    """
    return SampleResult.of(_C.sample(logits.numpy(), list(slots), state.arrays, mask, drafts))
