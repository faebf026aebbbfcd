"""Log-probabilities of prompt tokens, chunk by chunk (`decoder_input_details`, `echo`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from tgi_asgi import ops
from tgi_asgi.ops.arrays import Ints
from tgi_asgi.runner.plan import StepRow
from tgi_asgi.types import PromptLogprobs, TopTokens

_Logits = TypeVar("_Logits")  # the device's: an array or a tensor [n_rows, vocab]

_ROWS = 64  # rows of logits at a time: 12 MB with 49,152 tokens, 64 MB with 256k


class PromptScorer(Generic[_Logits]):
    """Scores each token of a chunk with the logits of the token before it.

    The first token of a chunk needs the last logits of the previous chunk, which are kept by slot.

    Args:
        logits: Computes the logits of tokens of the last step; valid until its next call.
        token_logprobs: Scores them on their device, as the operator of that name.
        copy: Copies them.
        max_rows: Maximum number of rows per call.
    """

    def __init__(
        self,
        logits: Callable[[Sequence[int]], _Logits],
        token_logprobs: Callable[[_Logits, Ints, int], ops.TokenLogprobs],
        copy: Callable[[_Logits], _Logits],
        *,
        max_rows: int = _ROWS,
    ) -> None:
        self._logits, self._token_logprobs, self._copy = logits, token_logprobs, copy
        self._max_rows = min(max_rows, _ROWS)
        self._tails: dict[int, _Logits] = {}  # slot -> logits [1, vocab] after its last token so far

    def forget(self, slot: int) -> None:
        """Drop a slot's state; another sequence uses the slot."""
        self._tails.pop(slot, None)

    def score(self, first: int, row: StepRow) -> PromptLogprobs:
        """Return one entry per token of `row`, whose tokens are first, first + 1, ... of the last step.

        Raises:
            ValueError: if the sequence's tokens before this chunk were computed without being scored.
        """
        if row.token_ids is None or row.prompt_logprobs is None:
            raise ValueError("prompt log-probabilities are of a chunk whose tokens are given")
        tokens, num_top = row.token_ids, row.prompt_logprobs
        tail = self._tails.pop(row.slot, None)
        if row.start == 0:
            result: PromptLogprobs = [(None, [])]
        elif tail is not None:
            result = self._pairs(tail, tokens[:1], num_top)
        else:
            raise ValueError(f"the tokens before position {row.start} have no log-probabilities")
        last = len(tokens) - 1
        for start in range(0, last, self._max_rows):
            stop = min(start + self._max_rows, last)
            logits = self._logits(range(first + start, first + stop))
            result += self._pairs(logits, tokens[start + 1 : stop + 1], num_top)
        if not row.samples:  # more of the prompt may follow
            self._tails[row.slot] = self._copy(self._logits([first + last]))
        return result

    def _pairs(self, logits: _Logits, tokens: Sequence[int], num_top: int) -> PromptLogprobs:
        found = self._token_logprobs(logits, np.array(tokens, np.int32), num_top)
        tops = [
            TopTokens(ids.tobytes() + logprobs.tobytes())
            for ids, logprobs in zip(found.top_ids, found.top_logprobs, strict=True)
        ]
        return list(zip(found.logprobs.tolist(), tops, strict=True))
