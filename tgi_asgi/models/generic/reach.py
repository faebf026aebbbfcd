"""How far a token of a whole prompt sees in both directions, read from mask functions as in `rules.py`.

For models that compute whole prompts without a cache: encoders, and decoders used for embeddings only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tgi_asgi.models.generic.rules import MaskFunction, pairs_seen

_PAIRS = 4096  # random pairs on which a reach is checked
_DENSE = 48  # first positions of which all pairs are checked: global tokens would be among them


@dataclass(frozen=True, slots=True)
class Reach:
    """A token at position p sees positions p - before ... p + after; None: all on that side."""

    before: int | None = None
    after: int | None = None

    @property
    def window(self) -> int | None:
        """Number of positions that a token sees up to and including its own."""
        return None if self.before is None else self.before + 1

    @property
    def ahead(self) -> float:
        """`after` as a number."""
        return math.inf if self.after is None else self.after


def reach_of(sees: MaskFunction, length: int) -> Reach | None:
    """Return the reach of a mask function among positions below `length`; None if it has none."""
    everywhere = torch.arange(length)
    after = _num_seen(pairs_seen(sees, torch.zeros_like(everywhere), everywhere))
    before = _num_seen(pairs_seen(sees, torch.full_like(everywhere, length - 1), everywhere.flip(0)))
    found = Reach(None if before == length else before - 1, None if after == length else after - 1)
    generator = torch.Generator().manual_seed(0)
    queries, far, near = (
        torch.randint(bound, (_PAIRS,), generator=generator)
        for bound in (length, length, min(4 * max(before, after), length))
    )
    near = (queries + near - int(near.max()) // 2).clamp(0, length - 1)
    begin = torch.cartesian_prod(*2 * [torch.arange(min(_DENSE, length))]).reshape(-1, 2)
    queries, keys = torch.cat([queries, queries, begin[:, 0]]), torch.cat([far, near, begin[:, 1]])
    is_seen = queries - keys <= (length if found.before is None else found.before)
    is_seen &= keys - queries <= (length if found.after is None else found.after)
    return found if torch.equal(is_seen, pairs_seen(sees, queries, keys)) else None


def _num_seen(seen: torch.Tensor) -> int:
    """Return the number of positions seen before the first one that is not."""
    hidden = (~seen).nonzero()
    return int(hidden[0]) if hidden.numel() else len(seen)
