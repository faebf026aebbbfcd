"""Which keys a query sees: read off the mask functions of `transformers`, never off a configuration.

A mask function is a predicate (batch, head, query index, key index) -> bool. It is the authority: models
carry `sliding_window` that they ignore, and windows that no field names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS = 4096  # random ones that a rule is held to
_DENSE = 48  # positions of which all pairs are: prefixes that all may see lie there
_UNKNOWN, _BIDIRECTIONAL = -(1 << 30), -(1 << 29)
# The number of "causal": a window's size is added, a chunk's taken off. Exact in float32, and far from what a
# model's own code would fill a mask with: zeros that it made are no rule.
_CAUSAL = 1 << 22
LONGEST = 1 << 17  # positions among which masks are read; a window beyond them is none

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """A query at position q sees keys k <= q, of these:

    Attributes:
        window: those with q - k < window; None: all.
        chunk: those with q // chunk == k // chunk; None: all.
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def longest(self) -> int | None:
        """How many positions a query sees at the most, its own the last; None: all."""
        return self.chunk if self.window is None else self.window

    def __str__(self) -> str:
        if self.window is not None:
            return f"window {self.window}"
        return "causal" if self.chunk is None else f"chunks of {self.chunk}"


class UnknownRule(ValueError):
    """A layer's mask is none that the kernels have."""


def rule_of(sees: MaskFunction, length: int) -> int:
    """Return a mask function's rule among positions below `length`, as a number that `decode_rule` reads.

    `length` is at most `LONGEST`.
    """
    everywhere = torch.arange(length)
    first = _call(sees, everywhere, torch.zeros_like(everywhere))
    ahead = _call(sees, everywhere[:-1], everywhere[1:])
    if bool(ahead.all()) and bool(first.all()):
        return _BIDIRECTIONAL
    hidden = (~first).nonzero()
    size = int(hidden[0]) if hidden.numel() else 0  # the first query that does not see the first key
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(length, (_PAIRS,), generator=generator)
    near = (queries - torch.randint(min(2 * size + 2, length), (_PAIRS,), generator=generator)).clamp(min=0)
    far = torch.randint(length, (_PAIRS,), generator=generator)
    begin = torch.cartesian_prod(*2 * [torch.arange(min(_DENSE, length))]).reshape(-1, 2)
    queries, keys = torch.cat([queries, queries, begin[:, 0]]), torch.cat([near, far, begin[:, 1]])
    found = _call(sees, queries, keys)
    for code in (size, -size):
        if torch.equal(found, _sees(code, queries, keys)):
            return _CAUSAL + code
    return _UNKNOWN


def window_rule(window: int | None) -> int:
    """Return the number of a window, or of none."""
    return _CAUSAL + (window or 0)


def decode_rule(code: int) -> Rule:
    """Return the rule that a number stands for.

    Raises:
        UnknownRule: it stands for none that a decoder has.
    """
    if code == _UNKNOWN:
        raise UnknownRule("a mask that is neither causal nor a window nor chunks")
    if code == _BIDIRECTIONAL:
        raise UnknownRule("attention in both directions")
    size = code - _CAUSAL
    if abs(size) > LONGEST:
        raise UnknownRule("a mask that its own code makes")
    return Rule(window=size if size > 0 else None, chunk=-size if size < 0 else None)


def _sees(code: int, queries: Tensor, keys: Tensor) -> Tensor:
    is_seen = keys <= queries
    if code > 0:
        is_seen &= queries - keys < code
    elif code < 0:
        is_seen &= queries // -code == keys // -code
    return is_seen


def _call(sees: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.long)
    found = sees(zero, zero, queries, keys)
    return torch.as_tensor(found, dtype=torch.bool).expand(queries.shape)
