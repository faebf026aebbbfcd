"""What recurrent layers keep of sequences, those that run and those that are gone on with: a pool of states.

Only this file and the kernels know their layout, which csrc/cpu/step/states.h draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.layout import PANEL, STRIP

_FLOAT_BYTES = 4
_HALVES = 2  # of a sequence's places: what a step begins with stays until the next has been computed


class StateShape(Protocol):
    """What one layer keeps: the window of a short convolution, and floats behind it.

    The window is of `num_taps` - 1 tokens of `num_channels`.
    """

    @property
    def num_channels(self) -> int: ...
    @property
    def num_taps(self) -> int: ...
    @property
    def num_floats(self) -> int: ...


def state_bytes(shape: StateShape, num_drafts: int = 0) -> int:
    """Return what a sequence that runs takes in the pool for one layer, with a state behind each draft."""
    return _HALVES * (1 + num_drafts) * kept_state_bytes(shape)


def kept_state_bytes(shape: StateShape) -> int:
    """Return what a state that is kept takes in the pool for one layer."""
    window = (shape.num_taps - 1) * _padded(shape.num_channels, STRIP)
    return (window + _padded(shape.num_floats, PANEL)) * _FLOAT_BYTES


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True, slots=True)
class StateLayer:
    """One layer's states."""

    pool: StatePool
    index: int
    num_channels: int
    num_taps: int
    num_floats: int


def states(operator: str, cache: object) -> StateLayer:
    """Return what an operator of a recurrent layer is given as `cache`.

    Raises:
        TypeError: it is of keys and values.
    """
    if not isinstance(cache, StateLayer):
        raise TypeError(f"`{operator}` takes states as `cache`, not {type(cache).__name__}")
    return cache


def states_of(operator: str, cache: object, num_floats: int) -> StateLayer:
    """Return the same of heads that keep so many floats.

    Raises:
        TypeError: it is of keys and values.
        ValueError: its states are of another size.
    """
    layer = states(operator, cache)
    if layer.num_floats != num_floats:
        raise ValueError(f"`{operator}` takes states of {num_floats} floats, not {layer.num_floats}")
    return layer


def check_heads(num_heads: int, **tensors: Tensor) -> None:
    """Refuse numbers of heads that are not float32 [num_heads].

    Raises:
        TypeError: some are of another dtype.
        ValueError: some are not one a head.
    """
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (num_heads,):
            raise ValueError(f"`{name}` must have {num_heads} elements, got {list(tensor.shape)}")
        if str(tensor.dtype) != "torch.float32":
            raise TypeError(f"`{name}` must be float32, got {tensor.dtype}")


class StatePool:
    """The states of all layers; the system commits it as places are first used.

        pool = StatePool([StateShape(2048, 3)] * 10, num_slots=128)
        y = ops.short_conv(rows, weight, pool.layers[0], is_gated=True)

    A sequence is known by its slot, `row_slots` of a step. A step that begins at position 0 begins with
    zeros; any other goes on where the slot's last or last but one has ended, or from a state that was kept
    (`resumes` of a step). `keeps` of a step: of which row a state is kept, in front of which position, where.

    Args:
        shapes: of each layer.
        num_slots: sequences that run.
        num_kept: places for states that are kept.
        num_drafts: most drafts of a row; which of them are right is known by where the next row begins.

    Raises:
        ValueError: a size that the kernels do not have.
        MemoryError: the system does not grant so much.

    Attributes:
        native: the same in the extension.
    """

    def __init__(
        self, shapes: Sequence[StateShape], *, num_slots: int, num_kept: int = 0, num_drafts: int = 0
    ) -> None:
        sizes = [(shape.num_channels, shape.num_taps, shape.num_floats) for shape in shapes]
        self.native = _C.StatePool(
            layers=sizes, num_slots=num_slots, num_kept=num_kept, num_drafts=num_drafts
        )
        self.layers = [StateLayer(self, index, *size) for index, size in enumerate(sizes)]
