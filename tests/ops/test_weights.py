"""Weights: sources whose bytes do not match their format, biases that do not fit, and stored bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ops.helpers import EXACT, FAST, as_int8, random_source
from tests.reference.compare import assert_close
from tests.support import eager_ops
from tests.support.random_weights import random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.sources import decode, integer_source
from tgi_asgi.ops.tensors import from_tensor, plain_tensor


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros(34, np.uint8), "Q9_9", (1, 32)), "`format` must be one of"),
        ((np.zeros(34, np.uint8), "Q8_0", (1, 31)), "multiple of 32"),
        ((np.zeros(35, np.uint8), "Q8_0", (1, 32)), "has 34 bytes, got 35"),
        ((np.zeros(16, np.float32), "F32", (4, 4)), "contiguous uint8"),
        ((np.zeros(128, np.uint8)[::2], "F32", (4, 4)), "contiguous uint8"),
        ((np.zeros(4, np.uint8), "F32", (1, 1, 1)), "one or two sizes"),
    ],
)
def test_sources_whose_bytes_are_not_what_they_say_are_refused(
    source: tuple[Any, str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.WeightSource(*source)


@pytest.mark.parametrize("tokens", [1, 64])
def test_four_bits_hold_zero_points_up_to_128(tokens: int, kernel_set: str) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (32, 32), np.uint8)
    scales = np.full((32, 2), 0.0625, np.float32)
    zeros = rng.integers(0, 129, (32, 2), np.uint8)
    zeros[:2, 0] = 0, 128
    source = integer_source(codes, scales, zeros, 4)
    assert source is not None
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(32, 64).astype(np.float64)
    matrix = 0.0625 * (nibbles - np.repeat(zeros, 32, axis=1))
    assert np.array_equal(decode(source), matrix)
    x = torch.randn(tokens, 64)
    found = eager_ops.linear(x, ops.linear_weight(source, FAST))
    assert_close(found, as_int8(x) @ torch.from_numpy(matrix).T, length=64)
    zeros[0, 0] = 129
    assert integer_source(codes, scales, zeros, 4) is None


def test_matrices_and_biases_of_another_shape_are_refused() -> None:
    source = random_source(4, 8)[1]
    with pytest.raises(ValueError, match="a bias must have 4 elements, got"):
        ops.linear_weight(source, EXACT, bias=random_source(5)[1])
    with pytest.raises(ValueError, match="`source` must be a matrix, got the shape"):
        ops.linear_weight(random_source(5)[1], EXACT)
    with pytest.raises(ValueError, match="a bias must have 4 elements, got"):
        ops.gate_up_weight(source, source, EXACT, biases=[random_source(4)[1], random_source(3)[1]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_sixteen_bits_is_decoded(dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    assert np.array_equal(decode(from_tensor(values)), values.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("shape", [(1,), (7, 3), (9, 4097)])
def test_floats_are_rounded_to_bfloat16_as_torch_does(shape: tuple[int, ...]) -> None:
    _C.set_num_threads(2)
    bits = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).int()
    special = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 1, 0])  # ties, NaN
    bits.view(-1)[: len(special)] = special[: bits.numel()]
    values = bits.view(torch.float32)
    made = ops.as_bfloat16(values.numpy())
    assert (made.format, made.shape) == ("BF16", shape)
    found, expected = decode(made), values.bfloat16().float().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    are_numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found[are_numbers]), np.signbit(expected[are_numbers]))


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("count", [1, 3])
def test_stacked_matrices_are_transposed_each(format: str, count: int) -> None:
    source = random_weight(format, 6, 5, seed=1)
    turned = source.transposed(count)
    expected = decode(source).reshape(count, 6 // count, 5).swapaxes(1, 2).reshape(count * 5, -1)
    assert (turned.format, turned.shape) == (format, expected.shape)
    assert np.array_equal(decode(turned), expected)
    with pytest.raises(ValueError, match="matrices in Q8_0 cannot be transposed"):
        random_weight("Q8_0", 6, 32, seed=1).transposed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_floats_are_rounded_on_request_but_not_a_router(dtype: torch.dtype) -> None:
    weights = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    source, packing = from_tensor(weights), ops.Packing(is_exact=False, rounds_floats=True)
    made: Any = ops.linear_weight(source, packing).made
    assert (made.matrix.format, made.precision) == ("BF16", "bfloat16")
    assert np.array_equal(made.matrix.unpack()[:5, :40], weights.bfloat16().float().numpy())
    for unrounded in (
        ops.linear_weight(source, FAST),
        ops.linear_weight(source, EXACT),
        ops.router_weight(source, packing),
    ):
        kept: Any = unrounded.made
        assert kept.precision == "float32"
        assert np.array_equal(kept.matrix.unpack()[:5, :40], weights.float().numpy())
    quantised = ops.Packing(is_exact=False, quantise="Q8_0", rounds_floats=True)
    assert ops.linear_weight(source, quantised).made.matrix.format == "Q8_0"


def test_a_read_only_view_is_decoded_and_packed_where_it_lies() -> None:
    data = np.arange(8, dtype=np.float32).view(np.uint8)
    data.flags.writeable = False
    source = ops.WeightSource(data, "F32", (2, 4))
    assert decode(source).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    matrix = ops.linear_weight(source, EXACT).made.matrix
    assert matrix.unpack()[:2, :4].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_weight_takes_the_bytes_of_its_file_padded_to_whole_blocks() -> None:
    matrix = ops.linear_weight(random_source(33, 40)[1], FAST).made.matrix
    assert (matrix.num_rows, matrix.num_columns, matrix.num_stored_rows) == (33, 40, 64)
    assert matrix.nbytes == 64 * 64 * 4
    codes = ops.linear_weight(random_weight("Q4_0", 64, 256, seed=0), FAST).made.matrix
    assert codes.nbytes == 64 * 8 * 18


def test_rows_of_a_source_are_a_view_of_its_bytes() -> None:
    source = random_weight("Q8_0", 10, 64, seed=1)
    part = source.rows(3, 7)
    assert part.shape == (4, 64)
    assert np.shares_memory(part.data, source.data)
    assert np.array_equal(decode(part), decode(source)[3:7])


def test_matrices_one_below_another_keep_their_bytes() -> None:
    first, second = torch.randn(3, 64), torch.randn(5, 64)
    joined = ops.stack_rows([from_tensor(first.bfloat16()), from_tensor(second.bfloat16())])
    assert (joined.format, joined.shape) == ("BF16", (8, 64))
    assert torch.equal(plain_tensor(joined), torch.cat([first, second]).bfloat16())
    mixed = ops.stack_rows([from_tensor(first.half()), from_tensor(second)])
    assert torch.equal(plain_tensor(mixed), torch.cat([first.half().float(), second]))
    with pytest.raises(ValueError, match="the same columns"):
        ops.stack_rows([from_tensor(first), from_tensor(second[:, :32])])
