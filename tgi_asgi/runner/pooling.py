"""Pools hidden states of prompts into vectors, chunk by chunk, or whole for encoders (`pool`).

Sums are in float64, token by token, so that a vector's bits do not depend on how its prompt was chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tgi_asgi.models.pooling import Dense
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.runner.plan import StepRow
from tgi_asgi.types import PoolingKind

_ROWS = 256  # hidden states converted to float64 at a time: 8 MiB at a hidden size of 4,096


class Accumulator:
    """Pools the hidden states of one prompt incrementally.

        accumulator = Accumulator(PoolingKind.MEAN)
        accumulator.add(states)              # [n_tokens, hidden], in order
        vector = accumulator.result()        # [hidden]

    Attributes:
        num_tokens: Number of states added.
    """

    def __init__(self, kind: PoolingKind) -> None:
        self.kind = kind
        self.num_tokens = 0
        self._value: npt.NDArray[np.float64] | None = None

    def add(self, states: Floats) -> None:
        """Add the states of the tokens that follow."""
        kind = self.kind
        if kind is PoolingKind.LAST or (kind is PoolingKind.CLS and not self.num_tokens):
            self._value = states[-1 if kind is PoolingKind.LAST else 0].astype(np.float64)
        elif kind is PoolingKind.MAX:
            highest = states.max(axis=0).astype(np.float64)
            self._value = highest if self._value is None else np.maximum(self._value, highest)
        elif kind is not PoolingKind.CLS:
            total = np.zeros(states.shape[1]) if self._value is None else self._value
            for at, row in enumerate(states, self.num_tokens + 1):  # 1 us each
                total += row * np.float64(at) if kind is PoolingKind.WEIGHTED_MEAN else row
            self._value = total
        self.num_tokens += len(states)

    def result(self) -> Floats:
        """Return the vector of all tokens so far."""
        assert self._value is not None, "there was no token"
        n = self.num_tokens
        divisor: float = {
            PoolingKind.MEAN: n,
            PoolingKind.MEAN_SQRT_LEN: n**0.5,
            PoolingKind.WEIGHTED_MEAN: n * (n + 1) / 2,
        }.get(self.kind, 1)
        return (self._value / divisor).astype(np.float32)


def pool(kind: PoolingKind, states: Floats, dense: Sequence[Dense] = ()) -> Floats:
    """Return the vector of a prompt whose states [n_tokens, hidden] are complete."""
    accumulator = Accumulator(kind)
    accumulator.add(states)
    return apply_dense(dense, accumulator.result())


class Pooler:
    """Pools the rows of a runner's steps.

    Args:
        hidden: Returns the states [n, hidden] of tokens [start, stop) of the last step, after the final norm.
        dense: Dense layers applied to vectors.
    """

    def __init__(self, hidden: Callable[[int, int], Floats], dense: Sequence[Dense] = ()) -> None:
        self._hidden = hidden
        self._dense = dense
        self._open: dict[int, Accumulator] = {}  # by slot: prompts with more chunks to come

    def forget(self, slot: int) -> None:
        """Drop a slot's state; another sequence uses the slot."""
        self._open.pop(slot, None)

    def take(self, first: int, row: StepRow) -> Floats | None:
        """Pool a row whose tokens are first, first + 1, ... of the last step; return a vector at its end.

        Raises:
            ValueError: if the pooling needs tokens before this chunk that were not pooled.
        """
        assert row.pooling is not None
        kind, stop = row.pooling.kind, first + row.num_tokens
        if kind is PoolingKind.LAST:
            return apply_dense(self._dense, self._hidden(stop - 1, stop)[0]) if row.samples else None
        found = self._open.pop(row.slot, None)
        accumulator = Accumulator(kind) if row.start == 0 or found is None else found
        if accumulator.num_tokens != row.start:
            raise ValueError(f"the tokens before position {row.start} have not been pooled")
        for start in range(first, stop, _ROWS):
            accumulator.add(self._hidden(start, min(start + _ROWS, stop)))
        if row.samples:
            return apply_dense(self._dense, accumulator.result())
        self._open[row.slot] = accumulator
        return None


def apply_dense(dense: Sequence[Dense], vector: Floats) -> Floats:
    """Return the vector [size] after the Dense layers."""
    for layer in dense:
        vector = layer.apply(vector)
    return vector
