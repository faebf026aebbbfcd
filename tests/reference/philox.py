"""Philox4x32-10 and the sampling of a token based on it, in plain Python.

Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_WORD = (1 << 32) - 1


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the four output words for a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def sample_token(scores: Sequence[float], seed: int, choice: int, position: int) -> int:
    """Return the argmax of score + Gumbel noise; a token with score -inf cannot be sampled."""
    best, winner = -math.inf, -1
    for token, score in enumerate(scores):
        if score == -math.inf:
            continue
        counter = (token, choice, position & _WORD, position >> 32)
        uniform = (philox(counter, (seed & _WORD, seed >> 32))[0] + 0.5) / 2**32
        perturbed = score - math.log(-math.log1p(-uniform))
        if perturbed > best:
            best, winner = perturbed, token
    return winner
