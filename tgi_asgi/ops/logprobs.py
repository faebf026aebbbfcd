"""Log-probabilities of given tokens, as prompts need them (`decoder_input_details`, `echo`)."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Floats, Ints


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the raw logits; fresh arrays, one entry per row."""

    logprobs: Floats  # [n_rows] float32, of the given token; NaN if the row is not finite
    top_ids: Ints  # [n_rows, num_top] int32, most probable first, lowest id first on ties
    top_logprobs: Floats  # [n_rows, num_top] float32


def token_logprobs(logits: Floats, token_ids: Ints, num_top: int) -> TokenLogprobs:
    """Return log softmax(logits [n_rows, vocab]) at token_ids [n_rows] int32, and the `num_top` best per row.

    Raises:
        ValueError: if a token id is out of range, or `num_top` is more than the vocabulary.
    """
    return TokenLogprobs(*_C.token_logprobs(logits, token_ids, num_top))
