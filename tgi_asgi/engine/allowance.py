"""The prompt tokens that are left of one step. Called by the scheduler and by `prompt_turns.py`; no torch."""

from __future__ import annotations

from tgi_asgi.engine.sequence import Sequence


class Allowance:
    """What is left of a step's prompt tokens.

    A prompt that ends in a step has its first token when the step ends. If a stream begins with that token,
    all else that the step computes delays it. From the first prompt on that would not end in the step, no
    more is left than beside that stream:

        num_tokens 400, num_beside_stream 100

        no stream begins    a a a a a a a a a a a a a a a a
        one begins, b       b a a a

    but at least as much as was planned before, so that short prompts do not stop a long one.

    Args:
        num_tokens: Number of prompt tokens in the step.
        num_beside_stream: Number of prompt tokens in a step with one more stream.
        block_size: Least number that is of use.
    """

    __slots__ = (
        "_begins_stream",
        "_block_size",
        "_is_reduced",
        "_num_beside_stream",
        "_num_planned",
        "num_left",
    )

    def __init__(self, num_tokens: int, num_beside_stream: int, block_size: int) -> None:
        self.num_left = num_tokens
        self._num_beside_stream = num_beside_stream
        self._block_size = block_size
        self._num_planned = 0
        self._begins_stream = self._is_reduced = False

    def limit(self, num_tokens: int) -> int:
        """Return how many tokens of the step a prompt may use that has `num_tokens` left to compute.

        If it would not end in the step, what is left is reduced first.
        """
        if num_tokens > self.num_left:
            self.reduce()
        return self.num_left

    def reduce(self) -> bool:
        """Cut what is left to what fits beside the stream that begins; return whether it became less.

        Called for a prompt that would not end in the step. Does nothing if no stream begins.
        """
        if not self._begins_stream or self._is_reduced:
            return False
        self._is_reduced = True
        planned = self._num_planned
        num_left = max(self._num_beside_stream - planned, planned, self._block_size)
        is_less = num_left < self.num_left
        self.num_left = min(self.num_left, num_left)
        return is_less

    def spend(self, sequence: Sequence, count: int) -> None:
        """Note that the step computes `count` tokens of a sequence, whose `num_left` is without them."""
        self.num_left -= count
        self._num_planned += count
        self._begins_stream |= count > 0 and sequence.num_left == 0 and sequence.may_decode
