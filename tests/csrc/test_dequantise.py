"""The decoder of weight formats: ggml's blocks by the formula, floats by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tgi_asgi.ops.weights import WeightSource, _decode


def blocks(count: int, size: int) -> np.ndarray:
    """Random blocks whose leading fp16 scales are finite."""
    data = np.random.default_rng(0).integers(0, 256, (count, size), dtype=np.uint8)
    data[:, 1] &= 0xBB
    data[:, 3] &= 0xBB
    return data


def scales(data: np.ndarray, at: int) -> np.ndarray:
    return data[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def nibbles(data: np.ndarray, at: int) -> np.ndarray:
    packed = data[:, at : at + 16]
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def decode(data: np.ndarray, format: str, columns: int) -> np.ndarray:
    return _decode(WeightSource(data.reshape(-1), format, (len(data), columns))).numpy()


@pytest.mark.parametrize("count", [1, 3, 17, 4100])
def test_q8_0_is_scale_times_int8(count: int) -> None:
    data = blocks(count, 34)
    expected = scales(data, 0) * data[:, 2:].copy().view(np.int8).astype(np.float32)
    np.testing.assert_array_equal(decode(data, "Q8_0", 32), expected)


@pytest.mark.parametrize("count", [1, 3, 17])
def test_q4_0_is_scale_times_nibble_less_8(count: int) -> None:
    data = blocks(count, 18)
    np.testing.assert_array_equal(decode(data, "Q4_0", 32), scales(data, 0) * (nibbles(data, 2) - 8))


@pytest.mark.parametrize("count", [1, 3, 17])
def test_q4_1_is_scale_times_nibble_plus_minimum(count: int) -> None:
    data = blocks(count, 20)
    expected = scales(data, 0) * nibbles(data, 4) + scales(data, 2)
    np.testing.assert_array_equal(decode(data, "Q4_1", 32), expected)


def test_every_fp16_value_is_decoded_exactly() -> None:
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16)
    source = WeightSource(halves.view(torch.uint8).numpy(), "F16", (1 << 16,))
    torch.testing.assert_close(_decode(source), halves.float(), rtol=0, atol=0, equal_nan=True)


def test_every_bfloat16_value_is_decoded_exactly() -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    source = WeightSource(values.view(torch.uint8).numpy(), "BF16", (1 << 16,))
    torch.testing.assert_close(_decode(source), values.float(), rtol=0, atol=0, equal_nan=True)


def test_a_read_only_view_is_decoded_where_it_lies() -> None:
    data = np.arange(8, dtype=np.float32).view(np.uint8)
    data.flags.writeable = False
    assert _decode(WeightSource(data, "F32", (2, 4))).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_bytes_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="must be a multiple of 34 bytes for Q8_0, got 33"):
        torch.ops.tgi.dequantise(torch.zeros(33, dtype=torch.uint8), "Q8_0", torch.empty(32))
    with pytest.raises(RuntimeError, match="weight format"):
        torch.ops.tgi.dequantise(torch.zeros(34, dtype=torch.uint8), "Q9_9", torch.empty(32))
