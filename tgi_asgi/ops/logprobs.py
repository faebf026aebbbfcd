"""Log-probabilities of given tokens, as prompts need them (`decoder_input_details`, `echo`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi import _C


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the raw logits; fresh tensors, one entry per row."""

    logprobs: Tensor  # [n_rows] float32, of the given token; NaN if the row is not finite
    top_ids: Tensor  # [n_rows, num_top] int32, most probable first, lowest id first on ties
    top_logprobs: Tensor  # [n_rows, num_top] float32


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> TokenLogprobs:
    """Return log softmax(logits [n_rows, vocab]) at token_ids [n_rows] int32, and the `num_top` best per row.

    Raises:
        ValueError: if a token id is out of range, or `num_top` is more than the vocabulary.
    """
    return TokenLogprobs(
        *map(torch.from_numpy, _C.token_logprobs(logits.numpy(), token_ids.numpy(), num_top))
    )
