"""Which keys a query sees: read from the mask functions of `transformers`, never from a configuration.

A mask function is a predicate (batch, head, query index, key index) -> bool. It is authoritative: some models
have a `sliding_window` that they ignore, and some have windows that no field names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS = 4096  # random pairs on which a rule is checked
_DENSE = 48  # first positions of which all pairs are checked: prefixes visible to all are there
_UNKNOWN, _BIDIRECTIONAL = -(1 << 30), -(1 << 29)
# The number that stands for "causal"; a window's size is added, a chunk's subtracted. It is exact in float32,
# and far from the values with which a model's own code fills masks: its zeros must not read as a rule.
_CAUSAL = 1 << 22
LONGEST = 1 << 17  # positions for which masks are read; a larger window counts as none

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """A query at position q sees keys k <= q that satisfy both of:

    Attributes:
        window: q - k < window; None: no limit.
        chunk: q // chunk == k // chunk; None: no limit.
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def longest(self) -> int | None:
        """Maximum number of positions that a query sees, its own last; None: all."""
        return self.chunk if self.window is None else self.window

    def __str__(self) -> str:
        if self.window is not None:
            return f"window {self.window}"
        return "causal" if self.chunk is None else f"chunks of {self.chunk}"


class UnknownRule(ValueError):
    """Raised when the kernels do not support a layer's mask."""


def rule_of(sees: MaskFunction, length: int) -> int:
    """Return a mask function's rule among positions below `length`, encoded as a number for `decode_rule`.

    `length` is at most `LONGEST`.
    """
    everywhere = torch.arange(length)
    first = pairs_seen(sees, everywhere, torch.zeros_like(everywhere))
    ahead = pairs_seen(sees, everywhere[:-1], everywhere[1:])
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
    found = pairs_seen(sees, queries, keys)
    for code in (size, -size):
        if torch.equal(found, _sees(code, queries, keys)):
            return _CAUSAL + code
    return _UNKNOWN


def window_rule(window: int | None) -> int:
    """Return the number that encodes a window, or none."""
    return _CAUSAL + (window or 0)


def decode_rule(code: int) -> Rule:
    """Return the rule that a number encodes.

    Raises:
        UnknownRule: if it encodes no rule that decoders support.
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


def pairs_seen(sees: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    """Return which of these keys the query beside each sees."""
    zero = torch.zeros((), dtype=torch.long)
    found = sees(zero, zero, queries, keys)
    return torch.as_tensor(found, dtype=torch.bool).expand(queries.shape)
