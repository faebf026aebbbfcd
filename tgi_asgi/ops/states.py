"""The recurrent states of sequences, both running and kept for later continuation: a pool of states.

Only this file and the kernels know their layout, which csrc/cpu/step/states.h describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.layout import PANEL, round_up

_FLOAT_BYTES = 4
_HALVES = 2  # places per running sequence: a step's initial state stays until the next has been computed


class StateShape(Protocol):
    """Sizes of one layer's state: the window of a short convolution, followed by floats.

    The window holds `num_taps` - 1 tokens of `num_channels`.
    """

    @property
    def num_channels(self) -> int: ...
    @property
    def num_taps(self) -> int: ...
    @property
    def num_floats(self) -> int: ...


def state_bytes(shape: StateShape, num_drafts: int = 0) -> int:
    """Return the bytes of a running sequence's state in one layer, including one state after each draft."""
    return _HALVES * (1 + num_drafts) * kept_state_bytes(shape)


def kept_state_bytes(shape: StateShape) -> int:
    """Return the bytes of a kept state in one layer."""
    window = (shape.num_taps - 1) * round_up(shape.num_channels)
    return (window + round_up(shape.num_floats, PANEL)) * _FLOAT_BYTES


@dataclass(frozen=True, slots=True)
class StateLayer:
    """One layer's states."""

    pool: StatePool
    index: int
    num_channels: int
    num_taps: int
    num_floats: int


def states(operator: str, cache: object) -> StateLayer:
    """Return the `cache` argument of a recurrent layer's operator as a `StateLayer`.

    Raises:
        TypeError: if it holds keys and values.
    """
    if not isinstance(cache, StateLayer):
        raise TypeError(f"`{operator}` takes states as `cache`, not {type(cache).__name__}")
    return cache


def states_of(operator: str, cache: object, num_floats: int) -> StateLayer:
    """Return `cache` as a `StateLayer` whose heads keep `num_floats` floats.

    Raises:
        TypeError: if it holds keys and values.
        ValueError: if its states have another size.
    """
    layer = states(operator, cache)
    if layer.num_floats != num_floats:
        raise ValueError(f"`{operator}` takes states of {num_floats} floats, not {layer.num_floats}")
    return layer


def check_heads(num_heads: int, **vectors: Floats) -> None:
    """Check that per-head parameters are float32 [num_heads].

    Raises:
        TypeError: if a vector has another dtype.
        ValueError: if a vector does not have one element per head.
    """
    for name, vector in vectors.items():
        if vector.shape != (num_heads,):
            raise ValueError(f"`{name}` must have {num_heads} elements, got {list(vector.shape)}")
        if vector.dtype != np.float32:
            raise TypeError(f"`{name}` must be float32, got {vector.dtype}")


class StatePool:
    """The states of all layers; the system commits the memory as places are first used.

        pool = StatePool(config.states, num_slots=128)
        y = ops.short_conv(rows, weight, pool.layers[0], is_gated=True)

    A sequence is identified by its slot, `row_slots` of a step. A row that begins at position 0 starts from
    zeros. Any other row continues where the slot's last or second-to-last step ended, or from a kept state
    (`resumes` of a step). `keeps` of a step lists the states to keep: the row, the position before which its
    state is kept, and the place.

    Args:
        shapes: State sizes of each layer.
        num_slots: Maximum number of running sequences.
        num_kept: Number of places for kept states.
        num_drafts: Maximum number of draft tokens per row; where the next row begins tells how many were
            accepted.

    Raises:
        ValueError: if the kernels do not support a size.
        MemoryError: if the system does not grant the memory.

    Attributes:
        native: The extension's pool.
    """

    def __init__(
        self, shapes: Sequence[StateShape], *, num_slots: int, num_kept: int = 0, num_drafts: int = 0
    ) -> None:
        sizes = [(shape.num_channels, shape.num_taps, shape.num_floats) for shape in shapes]
        self.native = _C.StatePool(
            layers=sizes, num_slots=num_slots, num_kept=num_kept, num_drafts=num_drafts
        )
        self.layers = [StateLayer(self, index, *size) for index, size in enumerate(sizes)]
