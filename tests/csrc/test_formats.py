"""Every row of the table of weight formats: decoded, packed, multiplied and repacked, against ggml or numpy.

A format that is added to the table is tested automatically if the `gguf` package supports it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_close, assert_same_bits
from tests.support import eager_ops
from tests.support.random_weights import E2M1
from tgi_asgi import _C, ops
from tgi_asgi.ops import layout
from tgi_asgi.ops.packing import PackedLinear

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]
TABLE = ops.FORMATS
FORMATS = tuple(TABLE)
PACKED = tuple(name for name, row in TABLE.items() if row.has_kernel)
CODES = tuple(name for name, row in TABLE.items() if row.is_quantised)
FLOATS = tuple(name for name in FORMATS if name not in CODES)


def _q8_1(blocks: _Bytes) -> _Floats:
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    weights: _Floats = scales * blocks[:, 4:].view(np.int8).astype(np.float32)
    return weights


def _int4(blocks: _Bytes) -> _Floats:
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    codes = np.stack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=2).reshape(len(blocks), -1)
    weights: _Floats = scales * (codes.astype(np.float32) - blocks[:, 2:3].astype(np.float32))
    return weights


def _float4(blocks: _Bytes) -> _Floats:
    halves = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32)
    codes = np.stack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=2).reshape(len(blocks), 2, 16)
    doubled = (2 * E2M1).numpy()[codes]
    weights: _Floats = halves[:, :, None] * doubled
    return weights.reshape(len(blocks), 32)


def _float8(blocks: _Bytes) -> _Floats:
    scales = np.ascontiguousarray(blocks[:, :4]).view(np.float32)
    codes = torch.from_numpy(np.ascontiguousarray(blocks[:, 4:])).view(torch.float8_e4m3fn)
    weights: _Floats = scales * codes.float().numpy()
    return weights


def _reference(name: str) -> Callable[[_Bytes], _Floats]:
    if TABLE[name].ggml_type is None:
        return {"INT4": _int4, "FP4_": _float4}.get(name[:4], _float8)
    if name == "Q8_1":  # only used for products inside ggml; `gguf` does not decode it
        return _q8_1

    def ggml(blocks: _Bytes) -> _Floats:
        weights: _Floats = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
        return weights

    return ggml


def decoded_values(data: _Bytes, name: str, columns: int) -> Tensor:
    """Return a file's rows as float32."""
    with np.errstate(all="ignore"):
        weights = _reference(name)(data.reshape(-1, TABLE[name].block_bytes))
    return torch.from_numpy(np.ascontiguousarray(weights)).reshape(-1, columns)


@functools.cache  # `gguf` decodes block by block, which would take half of the time
def random_rows(name: str, rows: int, columns: int, least: float = 0.0, most: float = np.inf) -> _Bytes:
    """Make rows of random bytes; make each block again until its largest weight is in range."""
    rng = np.random.default_rng(rows * columns)
    row = TABLE[name]
    blocks = np.zeros((rows * columns // row.block_columns, row.block_bytes), np.uint8)
    wrong = np.arange(len(blocks))
    while len(wrong):
        blocks[wrong] = rng.integers(0, 256, (len(wrong), row.block_bytes), np.uint8)
        largest = decoded_values(blocks[wrong], name, row.block_columns).abs().amax(-1).numpy()
        wrong = wrong[~(np.isfinite(largest) & (largest >= least) & (largest <= most))]
    return blocks.reshape(-1)


@functools.cache
def sound_rows(name: str, rows: int, columns: int) -> _Bytes:
    """Make rows whose weights suit products: none is much larger than the others."""
    if name in FLOATS:
        values = 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return values.to(dtype).view(torch.uint8).reshape(-1).numpy()
    return random_rows(name, rows, columns, 0.01, 1.0)


@functools.cache  # all kernel sets multiply by the same weights
def sound_weights(name: str, rows: int, columns: int) -> Tensor:
    """Return the weights of `sound_rows` as float64."""
    return decoded_values(sound_rows(name, rows, columns), name, columns).double()


def decode(data: _Bytes, name: str, columns: int) -> Tensor:
    return torch.from_numpy(_C.decode_rows(data, name, columns))


def packed(data: _Bytes, name: str, rows: int, columns: int) -> _C.Matrix:
    return _C.pack(
        sources=[data], format=name, columns=columns, order=layout.row_order(rows), arena=_C.Arena()
    )


def product(a: Tensor, matrix: _C.Matrix, precision: str, bias: Tensor | None = None) -> Tensor:
    """Return `a @ W.T (+ bias)` by the operator; the bias has an element for each stored row."""
    made = PackedLinear(matrix, precision, None if bias is None else bias.numpy())
    return eager_ops.linear(a, ops.LinearWeight(matrix.num_rows, matrix.num_columns, made))


def rounded(x: Tensor, precision: str) -> Tensor:
    """Return float32 rows in float64, rounded as a product of this precision rounds them."""
    if precision != "int8":
        return x.to(torch.bfloat16).double() if precision == "bfloat16" else x.double()
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127 / largest)).round()
    return (codes.double() * (largest * torch.tensor(1 / 127)).double()).reshape(x.shape)


@pytest.mark.parametrize("name", [name for name in FORMATS if TABLE[name].ggml_type is not None])
def test_a_block_is_of_the_size_that_gguf_says(name: str) -> None:
    row, type = TABLE[name], gguf.GGMLQuantizationType[name]
    assert row.ggml_type == type.value
    if name != "Q8_1":  # the package counts two float32 where ggml has two halves
        assert (row.block_columns, row.block_bytes) == gguf.GGML_QUANT_SIZES[type]


@pytest.mark.parametrize("name", FORMATS)
def test_a_decoded_row_has_the_bits_of_ggml(name: str) -> None:
    data = random_rows(name, 24, 1024)
    assert_same_bits(decode(data, name, 1024), decoded_values(data, name, 1024))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half_is_decoded(name: str) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.uint8)
    found, wanted = decode(every, name, 65536), decoded_values(every, name, 65536)
    assert_same_bits(torch.nan_to_num(found), torch.nan_to_num(wanted))
    assert torch.equal(found.isnan(), wanted.isnan())


def test_every_eight_bit_float_is_decoded() -> None:
    blocks = np.zeros((2, 132), np.uint8)
    blocks[:, :4] = np.float32(1).reshape(1).view(np.uint8)
    blocks[:, 4:] = np.arange(256, dtype=np.uint8).reshape(2, 128)
    found, wanted = (read(blocks.reshape(-1), "F8_128", 256) for read in (decode, decoded_values))
    assert_same_bits(torch.nan_to_num(found), torch.nan_to_num(wanted))
    assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("rows", [1, 49])
def test_a_packed_row_is_the_decoded_one(name: str, rows: int) -> None:
    data = random_rows(name, rows, 768)
    found = torch.from_numpy(packed(data, name, rows, 768).unpack())
    assert_same_bits(found[:rows], decode(data, name, 768))
    assert not found[rows:].any(), "padding must be zero"


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("columns", [1, 31, 45, 96])
def test_columns_of_floats_are_filled_up_with_zeros(name: str, columns: int) -> None:
    data = random_rows(name, 17, columns)
    found = torch.from_numpy(packed(data, name, 17, columns).unpack())
    assert_same_bits(found[:17, :columns], decode(data, name, columns))
    assert not found[:, columns:].any()


def quantised(values: Tensor, name: str) -> _Bytes:
    return _C.quantise(values.numpy().reshape(-1).view(np.uint8), "F32", values.shape[1], name)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_numbers_are_quantised_as_by_ggml(name: str) -> None:
    """Ties, of which Q8_0 rounds both signs away from zero; equal magnitudes of both signs; zeros."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((30, 1088)) * 10.0 ** rng.integers(-6, 4, (30, 1))).astype(np.float32)
    values[:10] = rng.integers(-254, 255, (10, 1088)) / 2  # in half steps of Q8_0, whose scale is 1 here
    values[:10, ::32] = 127
    values[:5, 1::32] = -127
    values[7] = 0
    blocks = quantised(torch.from_numpy(values), name).reshape(30, -1)
    wanted = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(blocks, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, 65504.0 * 9])
def test_numbers_without_a_scale_are_refused(value: float) -> None:
    values = torch.ones(2, 64)
    values[1, 63] = value
    with pytest.raises(ValueError, match="a number that is NaN, infinite or too large"):
        quantised(values, "Q4_0")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_columns_are_filled_up_with_zeros_before_they_are_quantised(name: str) -> None:
    values = torch.randn(3, 1064)  # a piece of 1,024, and a rest that fills no block
    padded = torch.cat([values, torch.zeros(3, 24)], dim=1)
    found, wanted = (quantised(part, name) for part in (values, padded))
    assert np.array_equal(found, wanted)
    assert not decode(found, name, 1088)[:, 1064:].any()


@pytest.mark.parametrize("name", CODES)
def test_repacked_codes_and_scales_mean_the_decoded_row(name: str) -> None:
    row, rows, columns = TABLE[name], 24, 1024
    data = random_rows(name, rows, columns)
    parts = _C.repack_rows(data, name, columns)
    codes, scales = map(torch.from_numpy, parts[:2])
    offsets = None if parts[2] is None else torch.from_numpy(parts[2])
    bits, group = row.repacked_bits, columns // scales.shape[1]
    if row.is_float8:
        values = codes.view(torch.float8_e4m3fn).float()
    elif bits == 4:
        words = torch.stack([codes & 15, codes >> 4], dim=-1).view(rows, columns // 8, 8).float()
        values = torch.empty_like(words)
        values[..., [0, 2, 4, 6, 1, 3, 5, 7]] = words
        values = values.view(rows, columns)
    else:
        values = codes.float()
    if row.is_float4:
        values, scales = E2M1[values.int()], torch.exp2(scales.float() - 127)
    weights = scales.repeat_interleave(group, dim=1) * (values - row.repacked_zero)
    if offsets is not None:
        weights += offsets.repeat_interleave(group, dim=1)
    assert torch.equal(weights, decode(data, name, columns))
    assert row.is_float4 is (name == "MXFP4")
    if row.has_half_scales:
        for plane in (scales, offsets):
            assert plane is None or torch.equal(plane, plane.half().float())


def _precisions(name: str) -> tuple[str, str]:
    fast = "int8" if TABLE[name].is_quantised else "bfloat16" if name == "BF16" else "float32"
    return fast, "float32"


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(48, 256, 13), (33, 768, 3), (17, 1280, 1)])
def test_a_product_is_that_of_the_rounded_activations(
    name: str, rows: int, columns: int, tokens: int, kernel_set: str
) -> None:
    a, bias = torch.randn(tokens, columns), torch.randn(-(-rows // 32) * 32)  # padded to whole strips
    data = sound_rows(name, rows, columns)
    for precision in dict.fromkeys(_precisions(name)):
        found = product(a, packed(data, name, rows, columns), precision, bias)
        wanted = rounded(a, precision) @ sound_weights(name, rows, columns).T + bias[:rows].double()
        # A value halfway between two codes may round either way.
        assert_close(found, wanted, length=columns * (40 if precision == "int8" else 4) ** 2)


@pytest.mark.parametrize("name", PACKED)
def test_a_row_has_the_same_bits_in_any_batch(name: str, kernel_set: str) -> None:
    a, matrix = torch.randn(13, 256), packed(sound_rows(name, 32, 256), name, 32, 256)
    decoded = ("bfloat16",) if TABLE[name].is_quantised else ()
    for precision in dict.fromkeys((*_precisions(name), *decoded)):
        alone = torch.cat([product(row[None], matrix, precision) for row in a])
        for size in (2, 3, 4, 5, 6, 7, 13):
            assert_same_bits(product(a[:size].contiguous(), matrix, precision), alone[:size])


@pytest.mark.parametrize("name", [name for name in CODES if name in PACKED])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(48, 256, 13), (33, 768, 70), (17, 1280, 1)])
def test_codes_by_bfloat16_have_the_bits_of_the_decoded_weight(
    name: str, rows: int, columns: int, tokens: int, kernel_set: str
) -> None:
    matrix, a = packed(sound_rows(name, rows, columns), name, rows, columns), torch.randn(tokens, columns)
    weights = torch.from_numpy(matrix.unpack()[:rows]).bfloat16()
    decoded = packed(weights.view(torch.uint8).reshape(-1).numpy(), "BF16", rows, columns)
    assert_same_bits(product(a, matrix, "bfloat16"), product(a, decoded, "bfloat16"))


@pytest.mark.parametrize("name", [name for name in CODES if name in PACKED])
def test_a_product_has_the_same_bits_with_every_set_of_kernels(name: str) -> None:
    a, before = torch.randn(7, 256), _C.kernel_set()
    matrix = packed(sound_rows(name, 64, 256), name, 64, 256)
    for precision in _precisions(name):
        results = []
        for kernels in _C.kernel_sets():
            _C.use_kernel_set(kernels)
            results.append(product(a, matrix, precision))
        _C.use_kernel_set(before)
        for result in results[1:]:
            assert_same_bits(result, results[0])


def test_halves_are_multiplied_as_the_floats_that_they_are(kernel_set: str) -> None:
    a, data = torch.randn(9, 256), sound_rows("F16", 64, 256)
    wide = decode(data, "F16", 256).view(torch.uint8).reshape(-1).numpy()
    halves = product(a, packed(data, "F16", 64, 256), "float32")
    assert_same_bits(halves, product(a, packed(wide, "F32", 64, 256), "float32"))
