"""Weights and KV pools: what is refused, and what a block copy moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ops.helpers import random_source
from tgi_asgi import ops
from tgi_asgi.ops.kv import kv_read, kv_write


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


def test_a_weight_of_another_dtype_or_bias_of_another_size_is_refused() -> None:
    source = random_source(4, 8)[1]
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got torch\.float16"):
        ops.linear_weight(source, dtype=torch.float16)
    with pytest.raises(ValueError, match="must have 4 elements, got 5"):
        ops.linear_weight(source, dtype=torch.float32, bias=random_source(5)[1])


def test_the_bytes_of_a_weight_are_counted() -> None:
    weight = ops.linear_weight(random_source(4, 8)[1], dtype=torch.bfloat16, bias=random_source(4)[1])
    assert weight.num_bytes == 4 * 8 * 2 + 4 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 24}, "block_size"),
        ({"head_dim": 24}, "head_dim"),
        ({"dtype": torch.float16}, "dtype"),
        ({"dtype": torch.int8}, "multiple of 32 with int8"),
    ],
)
def test_a_pool_that_the_kernels_do_not_have_is_refused(change: dict[str, Any], message: str) -> None:
    sizes = {"num_layers": 1, "num_blocks": 2, "num_kv_heads": 1, "head_dim": 16, "block_size": 16}
    with pytest.raises(ValueError, match=message):
        ops.allocate_kv(**{**sizes, "dtype": torch.float32, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_blocks_hold_what_their_sources_held(dtype: torch.dtype) -> None:
    layers = ops.allocate_kv(2, 6, 2, 32, 16, dtype)
    every = torch.arange(6 * 16)
    written = []
    for layer in layers:
        key, value = torch.randn(96, 2, 32).to(dtype), torch.randn(96, 2, 32).to(dtype)
        kv_write(layer, every, key, value)
        written.append((key, value))
    ops.copy_blocks(layers, [(1, 4), (1, 5), (3, 0)])
    origin = torch.tensor([3, 1, 2, 3, 1, 1]).repeat_interleave(16) * 16 + torch.arange(16).repeat(6)
    for layer, (key, value) in zip(layers, written, strict=True):
        found_key, found_value = kv_read(layer, every)
        assert torch.equal(found_key, key[origin])
        assert torch.equal(found_value, value[origin])


def test_copied_blocks_of_int8_are_the_same_bytes() -> None:
    layers = ops.allocate_kv(2, 6, 2, 32, 16, torch.int8)
    for layer in layers:
        layer.pool.copy_(torch.randint(-128, 128, layer.pool.shape, dtype=torch.int8))
    before = [layer.pool.clone() for layer in layers]
    ops.copy_blocks(layers, [(1, 4), (1, 5), (3, 0)])
    for layer, held in zip(layers, before, strict=True):
        assert torch.equal(layer.pool, held[[3, 1, 2, 3, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_bytes_of_a_token_are_those_of_the_pool(dtype: torch.dtype) -> None:
    layers = ops.allocate_kv(3, 4, 2, 32, 16, dtype)
    held = sum(layer.pool.nbytes for layer in layers)
    assert ops.kv_bytes_per_token(3, 2, 32, dtype) * 4 * 16 == held
