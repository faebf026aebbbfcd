"""The operator `sample`: one token per row of logits, with its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Bools, Floats, Ints
from tgi_asgi.ops.sample_state import SampleState


@dataclass(frozen=True, slots=True)
class SampleResult:
    """The sampled tokens; fresh arrays, one entry per row of the logits."""

    token_ids: Ints  # [n_rows] int32
    is_finite: Bools  # [n_rows] bool; False: the logits held NaN or +inf, or no token could be sampled
    logprobs: Floats  # [n_rows] float32, of the sampled token; NaN if the slot wants none
    top_ids: Ints  # [n_rows, max_top] int32, most probable first, lowest id first on ties
    top_logprobs: Floats  # [n_rows, max_top] float32
    num_top: Ints  # [n_rows] int32: number of a row's top entries that are filled
    # [n_rows] bool: False if a draft before the row was rejected (another token was sampled); None on a GPU,
    # whose runner finds out.
    is_accepted: Bools | None = None


def sample(
    logits: Floats,
    state: SampleState,
    slots: Sequence[int],
    *,
    mask: npt.NDArray[np.int32] | None = None,
    drafts: Sequence[int] = (),
) -> SampleResult:
    """Sample one token for each row of logits [n_rows, vocab] float32, with the parameters of its slot.

    In order: penalties (repetition, frequency, presence), bias, masked ids, `mask`, temperature, top-k, top-p
    over the renormalised top-k set, min-p, typical-p. Cut-offs keep all tied tokens. Then the token is
    sampled by Gumbel-max (in the equivalent form of a race of exponentials) with Philox4x32-10, key (seed,
    choice), counter (position, token id), so it does not depend on the rest of the batch. Temperature 0 is
    the argmax after the masks, lowest id on ties.

    Depending on the slot's mode, log-probabilities describe the softmax of the raw logits or the distribution
    that was sampled from (for greedy: the softmax after penalties, bias and masks). Ids outside that
    distribution are not listed.

    Args:
        logits: Not changed.
        state: The state of the slots. For each slot named, the position, the last id and the counts advance
            by the sampled token. A row that is not finite yields id 0, and its slot stays unchanged.
        slots: Slot of each row; all different, except for rows that follow drafts.
        mask: [n_rows, ceil(vocab / 32)] int32, bit i % 32 of word i / 32 set if token i is allowed.
        drafts: [n_rows] or empty. A non-negative entry is a draft token: the row continues the slot of the
            row before it, and its logits follow this token. The row is sampled as if the row before had
            yielded this token, and counts only if it did.

    Raises:
        ValueError: if shapes do not fit, or a slot is out of range or named twice.
    """
    return SampleResult(*_C.sample(logits, list(slots), state.arrays, mask, drafts))
