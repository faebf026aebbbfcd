"""How many prompt tokens a step may compute so that running streams keep their pace; learnt while serving."""

from __future__ import annotations

_UNKNOWN_COST_TOKENS = 128  # the first prompt chunk, whose time teaches the cost of a token
_WEIGHT = 0.25  # of the newest step in the running means


class TokenBudget:
    """Model a step's time as `decode + tokens * cost` and solve it for the target.

    `decode` is a running mean of steps without prompt tokens, `cost` of what each prompt token adds, weighted
    by tokens: a short prompt, whose step takes as long as a decode step, says little. Errors of the first go
    into the second, which is measured where it is used, so mixed steps settle on the target.
    """

    __slots__ = (
        "_block_size", "_decode_s", "_limit", "_max_tokens", "_prefill_s", "_prefill_tokens", "_target_s",
    )  # fmt: skip

    def __init__(self, *, max_tokens: int, block_size: int, target_s: float) -> None:
        self._max_tokens = max_tokens
        self._limit = max_tokens  # less after a step that found no memory
        self._block_size = block_size
        self._target_s = target_s
        self._decode_s: float | None = None
        self._prefill_s = 0.0  # decaying sums
        self._prefill_tokens = 0.0

    @property
    def _cost_s(self) -> float:
        return max(self._prefill_s / self._prefill_tokens, 0.0) if self._prefill_tokens else 0.0

    def tokens(self, num_decode_rows: int) -> int:
        """Return how many prompt tokens the next step may compute: whole blocks, or the maximum.

        At least one block, so that prompts always advance. Where decoding alone misses the target, prompts
        get half of its time: the streams are late anyway, and starving prompts would not help them.
        """
        return min(self._wanted(num_decode_rows), self._limit)

    def _wanted(self, num_decode_rows: int) -> int:
        if not self._prefill_tokens:
            return min(_UNKNOWN_COST_TOKENS, self._max_tokens)
        if num_decode_rows == 0:
            return self._max_tokens
        decode_s = self._decode_s or 0.0
        room_s = max(self._target_s - decode_s, decode_s / 2)
        tokens = int(room_s / max(self._cost_s, room_s / self._max_tokens))
        aligned = tokens - tokens % self._block_size
        return min(max(aligned, self._block_size), self._max_tokens)

    def observe(self, num_prefill_tokens: int, duration_s: float) -> None:
        """Learn from a step that took `duration_s`."""
        if num_prefill_tokens:
            keep = 1 - _WEIGHT
            self._prefill_s = keep * self._prefill_s + duration_s - (self._decode_s or 0.0)
            self._prefill_tokens = keep * self._prefill_tokens + num_prefill_tokens
            self._limit = min(self._limit + self._block_size, self._max_tokens)
        elif self._decode_s is None:
            self._decode_s = duration_s
        else:
            self._decode_s += _WEIGHT * (duration_s - self._decode_s)

    def shrink(self, num_prefill_tokens: int) -> None:
        """Learn that a step of so many prompt tokens found no memory: take half, and creep up again."""
        self._limit = max(min(self._limit, num_prefill_tokens // 2), self._block_size)

    def predict_s(self, num_prefill_tokens: int) -> float:
        """Return how long a step is expected to take; 0 while nothing is known."""
        return (self._decode_s or 0.0) + num_prefill_tokens * self._cost_s
