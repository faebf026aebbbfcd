"""The prompt tokens that one step may still compute, for the prompts that end in it and for the others.

Called by the scheduler and by `prompt_turns.py`; knows neither torch nor asyncio.
"""

from __future__ import annotations

from tgi_asgi.engine.sequence import Sequence


class Allowance:
    """What is left of a step's prompt tokens.

    A prompt that ends in a step has its first token when the step ends. If a stream begins with that token,
    the prompts after it that do not end in the step share what they would have beside the stream:

        tokens 400, beside_stream 100

        nothing ends      a a a a a a a a a a a a a a a a
        b ends first      b a a a

    They have no less than all prompts before them, so that short ones do not stop them.

    Args:
        tokens: Number of prompt tokens in the step.
        beside_stream: Number of prompt tokens in a step with one more stream.
        block_size: Least number that is of use.
    """

    __slots__ = ("_begins_stream", "_beside_stream", "_block_size", "_left_of_others", "_num_planned", "left")

    def __init__(self, tokens: int, beside_stream: int, block_size: int) -> None:
        self.left = tokens
        self._beside_stream = beside_stream
        self._block_size = block_size
        self._num_planned = 0
        self._begins_stream = False
        self._left_of_others: int | None = None  # for prompts that do not end, from the first one on

    def limit(self, sequence: Sequence, share: int) -> int:
        """Return how many of the `share` of tokens that its turn leaves a sequence may compute."""
        if not self._begins_stream or sequence.num_left <= share:
            return share
        if self._left_of_others is None:
            planned = self._num_planned
            self._left_of_others = max(self._beside_stream - planned, planned, self._block_size)
        return min(share, self._left_of_others)

    def spend(self, sequence: Sequence, count: int) -> None:
        """Note that the step computes `count` tokens of a sequence, whose `num_left` is without them."""
        self.left -= count
        self._num_planned += count
        if count and not sequence.num_left:
            self._begins_stream |= sequence.will_decode
        elif self._left_of_others is not None:
            self._left_of_others = max(self._left_of_others - count, 0)
