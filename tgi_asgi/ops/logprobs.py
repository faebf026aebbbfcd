"""Log-probabilities of given tokens: what prompts need (`decoder_input_details`, `echo`), without a draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi.ops.meta import meta_of, require


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the raw logits; fresh tensors, one entry a row."""

    logprobs: Tensor  # [n_rows] float32, of the token asked about; NaN where the row is not finite
    top_ids: Tensor  # [n_rows, num_top] int32, most probable first, lowest id first on ties
    top_logprobs: Tensor  # [n_rows, num_top] float32


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> TokenLogprobs:
    """Return log softmax(logits [n_rows, vocab]) at token_ids [n_rows] int32, and the `num_top` best a row.

    Raises:
        RuntimeError: a token id is out of range, or `num_top` is more than the vocabulary.
    """
    rows = logits.shape[0]
    result = TokenLogprobs(
        logprobs=torch.empty(rows),
        top_ids=torch.empty(rows, num_top, dtype=torch.int32),
        top_logprobs=torch.empty(rows, num_top),
    )
    torch.ops.tgi.token_logprobs(logits, token_ids, result.logprobs, result.top_ids, result.top_logprobs)
    return result


@meta_of("token_logprobs")
def _token_logprobs_meta(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> None:
    require(token_ids.shape == (logits.shape[0],))
