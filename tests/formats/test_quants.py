"""Blocks to floats, against the reference implementation of the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufType
from tgi_asgi.formats.quants import dequantise, is_supported

SUPPORTED = [kind for kind in GgufType if is_supported(kind)]


def random_blocks(kind: GgufType, num_blocks: int) -> np.ndarray:
    """Random bytes with finite scales: float16 and float32 exponents of all ones are cleared."""
    data = np.random.default_rng(kind).integers(0, 256, (num_blocks, kind.block_bytes), dtype=np.uint8)
    if kind is GgufType.F32 or kind is GgufType.BF16:
        data[:, -1] &= 0xBF
    elif kind is not GgufType.Q6_K:
        data[:, 1] &= 0xBF
        if kind in (GgufType.Q4_1, GgufType.Q5_1, GgufType.Q4_K, GgufType.Q5_K):
            data[:, 3] &= 0xBF
    else:
        data[:, 209] &= 0xBF
    return data.reshape(-1)


def test_the_types_of_the_specification_are_supported() -> None:
    names = {kind.name for kind in SUPPORTED}
    assert names >= {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize("kind", SUPPORTED, ids=lambda kind: kind.name)
def test_every_block_is_decoded_exactly_as_ggml_does(kind: GgufType) -> None:
    raw = random_blocks(kind, 300)
    expected = gguf.quants.dequantize(raw.reshape(300, -1), gguf.GGMLQuantizationType(kind))
    values = dequantise(raw, kind, (300, kind.block_size))
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values, np.asarray(expected, np.float32).reshape(values.shape))


@pytest.mark.parametrize("kind", [GgufType.F16, GgufType.Q8_0, GgufType.Q6_K], ids=lambda kind: kind.name)
def test_a_tensor_larger_than_a_chunk_is_decoded_whole(kind: GgufType) -> None:
    num_blocks = (1 << 20) // kind.block_size + 7
    raw = random_blocks(kind, num_blocks)
    values = dequantise(raw, kind, (num_blocks, kind.block_size))
    tail = dequantise(raw[-9 * kind.block_bytes :], kind, (9, kind.block_size))
    np.testing.assert_array_equal(values[-9:], tail)


def test_unaligned_bytes_are_decoded() -> None:
    raw = random_blocks(GgufType.F32, 5)
    shifted = np.concatenate([np.zeros(1, np.uint8), raw])[1:]
    np.testing.assert_array_equal(dequantise(shifted, GgufType.F32, (5,)), raw.view("<f4"))


def test_a_type_without_decoder_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match="type IQ2_XS are not supported; supported are F32, F16"):
        dequantise(np.zeros(74, np.uint8), GgufType.IQ2_XS, (256,))


@pytest.mark.parametrize("shape", [(31,), (64,), (32, 3)])
def test_bytes_that_do_not_fit_the_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelLoadError, match="cannot take 34 bytes"):
        dequantise(np.zeros(34, np.uint8), GgufType.Q8_0, shape)
