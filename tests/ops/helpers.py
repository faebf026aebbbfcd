"""Weights for the operators' tests, made as a loader makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops import Packing, RopeTable, WeightSource
from tgi_asgi.ops.tensors import from_tensor

EXACT = Packing(is_exact=True)  # float32 times the decoded weights
FAST = Packing(is_exact=False)  # the serving default: int8 or bfloat16, depending on the weights


def random_source(*shape: int, scale: float = 1.0) -> tuple[Tensor, WeightSource]:
    """Return a random float32 tensor of this shape and its source."""
    tensor = torch.randn(shape) * scale
    return tensor, from_tensor(tensor)


def rope_table(rotary_dim: int, max_positions: int) -> RopeTable:
    """Return a rotary table as a model uses it."""
    return RopeTable.create([10000 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)], max_positions)


def angles(rope: RopeTable, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of these positions."""
    return torch.from_numpy(rope.cos)[positions], torch.from_numpy(rope.sin)[positions]


def as_int8(x: Tensor) -> Tensor:
    """Round float32 rows to eight bits in blocks of 32, as the kernels do."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32))
    blocks = padded.reshape(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(largest > 0, 127 / largest, torch.zeros(()))).round()
    return (codes.double() * (largest * torch.tensor(1 / 127)).double()).reshape(padded.shape)[
        :, : x.shape[1]
    ]


def rounded(x: Tensor, precision: str) -> Tensor:
    """Return an activation in float64, rounded as products of this precision round it."""
    if precision == "int8":
        return as_int8(x)
    return x.to(torch.bfloat16).double() if precision == "bfloat16" else x.double()


def with_each_kernel_set(compute: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Compute with each kernel set; yield their names and results."""
    before = _C.kernel_set()
    for name in _C.kernel_sets():
        _C.use_kernel_set(name)
        try:
            yield name, compute()
        finally:
            _C.use_kernel_set(before)
