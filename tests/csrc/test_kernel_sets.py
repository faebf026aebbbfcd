"""Results that must be bitwise equal in all kernel sets, and how products with AMX tiles round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import FAST, random_source, with_each_kernel_set
from tests.reference.compare import assert_same_bits
from tests.support.random_weights import random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops import direct
from tgi_asgi.ops.tensors import from_tensor

BY_TILES = 32  # least number of tokens for which tiles multiply codes


def arithmetic_of(name: str) -> str:
    """Return how a kernel set rounds bfloat16 products."""
    before = _C.kernel_set()
    _C.use_kernel_set(name)
    try:
        return _C.kernel_arithmetic()
    finally:
        _C.use_kernel_set(before)


@pytest.mark.parametrize(
    "format", [name for name, each in ops.FORMATS.items() if each.is_quantised and each.has_kernel]
)
@pytest.mark.parametrize("tokens", [BY_TILES - 1, BY_TILES, 70])
def test_products_of_codes_have_the_same_bits_in_every_set(format: str, tokens: int) -> None:
    weight = ops.linear_weight(random_weight(format, 96, 512, seed=3), FAST)
    x = torch.randn(tokens, 512)
    (_, expected), *others = with_each_kernel_set(lambda: direct.linear(weight, x))
    for _, found in others:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("tokens", [1, 16, 17, 600])
def test_products_of_bfloat16_have_the_same_bits_in_sets_of_one_arithmetic(tokens: int) -> None:
    weight = _bfloat16(64, 640)
    x = torch.randn(tokens, 640)
    expected: dict[str, Tensor] = {}
    for name, found in with_each_kernel_set(lambda: direct.linear(weight, x)):
        assert_same_bits(found, expected.setdefault(arithmetic_of(name), found))


def test_products_of_tiles_round_as_they_were_measured_to() -> None:
    # Each 32 columns form two float32 sums, of the even and of the odd columns, each in order. A product of
    # two bfloat16 is exact, so adding it equals an FMA. Measured on Sapphire Rapids over 23 million outputs.
    sets = [name for name in _C.kernel_sets() if arithmetic_of(name) == "tdpbf16ps"]
    if not sets:
        pytest.skip("this machine has neither tiles nor their model")
    columns = 96
    tensor, _ = random_source(32, columns)
    weight = ops.linear_weight(from_tensor(tensor.bfloat16()), FAST)
    x = torch.randn(5, columns)
    w = torch.from_numpy(weight.made.matrix.unpack())[:32, :columns].numpy()
    a = x.bfloat16().float().numpy()
    expected = np.zeros((5, 32), np.float32)
    for block in range(0, columns, 32):
        sums = [np.zeros((5, 32), np.float32) for _ in range(2)]
        for k in range(32):
            sums[k % 2] = sums[k % 2] + a[:, block + k, None] * w[None, :, block + k]
        expected = expected + (sums[0] + sums[1])
    for name, found in with_each_kernel_set(lambda: direct.linear(weight, x)):
        if name in sets:
            assert_same_bits(found, torch.from_numpy(expected))


def _bfloat16(rows: int, columns: int) -> ops.LinearWeight:
    tensor, _ = random_source(rows, columns)
    return ops.linear_weight(from_tensor(tensor.bfloat16()), FAST)
