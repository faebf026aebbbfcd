"""How many prompt tokens a step may compute so that running streams keep their pace; learnt while serving."""

from __future__ import annotations

_UNKNOWN_COST_TOKENS = 512  # the first prompt chunk, whose time teaches the cost of a token
_WEIGHT = 0.25  # of the newest step in the running means


class TokenBudget:
    """Model a step's time as `decode + tokens * cost` and solve it for the target.

    `decode` is a running mean of steps without prompt tokens, `cost` of what each prompt token adds. Errors
    of the first go into the second, which is measured where it is used, so mixed steps settle on the target.
    """

    __slots__ = ("_block_size", "_cost_s", "_decode_s", "_max_tokens", "_target_s")

    def __init__(self, *, max_tokens: int, block_size: int, target_s: float) -> None:
        self._max_tokens = max_tokens
        self._block_size = block_size
        self._target_s = target_s
        self._decode_s: float | None = None
        self._cost_s: float | None = None

    def tokens(self, num_decode_rows: int) -> int:
        """Return how many prompt tokens the next step may compute: whole blocks, or the maximum.

        At least one block, so that prompts always advance. Where decoding alone misses the target, prompts
        get half of its time: the streams are late anyway, and starving prompts would not help them.
        """
        if self._cost_s is None:
            return min(_UNKNOWN_COST_TOKENS, self._max_tokens)
        if num_decode_rows == 0:
            return self._max_tokens
        decode_s = self._decode_s or 0.0
        room_s = max(self._target_s - decode_s, decode_s / 2)
        tokens = int(room_s / self._cost_s) if self._cost_s > 0 else self._max_tokens
        aligned = tokens - tokens % self._block_size
        return min(max(aligned, self._block_size), self._max_tokens)

    def observe(self, num_decode_rows: int, num_prefill_tokens: int, duration_s: float) -> None:
        """Learn from a step that took `duration_s`."""
        if num_prefill_tokens:
            decode_s = (self._decode_s or 0.0) if num_decode_rows else 0.0
            cost_s = max(duration_s - decode_s, 0.0) / num_prefill_tokens
            self._cost_s = cost_s if self._cost_s is None else _blend(self._cost_s, cost_s)
        elif num_decode_rows:
            self._decode_s = duration_s if self._decode_s is None else _blend(self._decode_s, duration_s)

    def predict_s(self, num_prefill_tokens: int) -> float:
        """Return how long a step is expected to take; 0 while nothing is known."""
        return (self._decode_s or 0.0) + num_prefill_tokens * (self._cost_s or 0.0)


def _blend(mean: float, value: float) -> float:
    return mean + _WEIGHT * (value - mean)
