"""The CUDA kernels of quantised weights in emulation: file blocks repacked, decoded, multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulation import bindings, library
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close, assert_equal
from tests.support.random_weights import E2M1, QUANTISED, decoded_values, random_weight
from tgi_asgi.formats.codes import IntegerMatrix
from tgi_asgi.ops.cuda_linear import QuantLinear
from tgi_asgi.ops.cuda_list import LaunchList, Size
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, Repacking, can_repack, repack
from tgi_asgi.ops.cuda_scratch import Scratch
from tgi_asgi.ops.formats import FORMATS as TABLE
from tgi_asgi.ops.packing import Packing
from tgi_asgi.ops.sources import WeightSource, float8_source, integer_source
from tgi_asgi.ops.weights import linear_weight

GROUPED = ("INT4_32", "INT4_64", "INT4_128", "F8_32", "F8_64", "F8_128")
FORMATS = [*QUANTISED, *GROUPED]


def random_source(name: str, rows: int, columns: int) -> tuple[WeightSource, Tensor]:
    """Return random blocks and the matrix that they decode to."""
    if name in GROUPED:
        return random_grouped(name, rows, columns)
    source = random_weight(name, rows, columns, seed=1)
    return source, decoded_values(source)


def random_grouped(name: str, rows: int, columns: int) -> tuple[WeightSource, Tensor]:
    run = int(name.partition("_")[2])
    scales = torch.randn(rows, columns // run) * 0.01
    by_column = scales.repeat_interleave(run, 1)
    if name.startswith("F8"):
        codes = torch.randint(256, (rows, columns), dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # not a number
        floats = codes.view(torch.float8_e4m3fn).float()
        return float8_source(codes.numpy(), scales.numpy()), floats * by_column
    codes, zeros = torch.randint(16, (rows, columns)), torch.randint(17, scales.shape)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    scales = scales.half().float()
    made = integer_source(packed.numpy(), scales.numpy(), zeros.to(torch.uint8).numpy(), 4)
    assert made is not None and made.format == name
    return made, (codes - zeros.repeat_interleave(run, 1)) * scales.repeat_interleave(run, 1)


def every_mxfp4(rows: int, columns: int, most: int) -> tuple[WeightSource, Tensor]:
    """Return blocks of exponents 0, 1, ... with all codes in them, and the matrix in float64.

    Blocks with exponents above `most` are zero.
    """
    shape = (rows, columns // 32)
    exponents = torch.arange(rows * columns // 32).view(shape) % 256
    codes = torch.stack([torch.arange(32).roll(shift) % 16 for shift in range(exponents.numel())])
    codes = codes.view(*shape, 32) * (exponents <= most)[..., None]
    blocks = torch.cat([exponents[..., None], codes[..., :16] | codes[..., 16:] << 4], -1).to(torch.uint8)
    values = torch.ldexp(E2M1[codes].double(), exponents[..., None] - 127)
    return WeightSource(blocks.numpy().reshape(-1), "MXFP4", (rows, columns)), values.view(rows, columns)


def weight_params(device: Device, matrix: CudaQuantMatrix) -> dict[str, Any]:
    codes, scales = device.constant(matrix.codes), device.constant(matrix.scales)
    offsets = None if matrix.offsets is None else device.constant(matrix.offsets)
    bits, num_columns = matrix.bits, codes.shape[1] * 8 // matrix.bits
    return {
        "codes": codes, "scales": scales, "offsets": offsets, "num_rows": codes.shape[0],
        "num_columns": num_columns, "group": num_columns // scales.shape[0],
        "scale_stride": scales.shape[1], "bits": bits,
        "zero": matrix.zero, "has_wide_scales": scales.dtype is torch.float32,
        "has_float_codes": codes.dtype is not torch.uint8 or scales.dtype is torch.uint8,
    }  # fmt: skip


def check_product(
    device: Device,
    name: str,
    tokens: int,
    rows: int,
    columns: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    is_wide: bool = False,
    is_added: bool = False,
    has_bias: bool = False,
) -> None:
    source, values = random_source(name, rows, columns)
    a = device.tensor(torch.randn(tokens, columns).to(dtype))
    bias = device.tensor(torch.randn(rows)) if has_bias else None
    out_dtype = torch.float32 if is_wide else dtype
    out = device.empty((tokens, rows), out_dtype)
    expected = a.double() @ values.double().T + (0 if bias is None else bias.double())
    if is_added:
        out.copy_(torch.randn(tokens, rows))
        expected += out.double()
    device.run(
        "quant_linear", [out], **weight_params(device, repack([source])), a=a, bias=bias, out=out,
        num_tokens=tokens, is_wide=is_wide, is_added=is_added, type=TYPES[dtype],
    )  # fmt: skip
    assert_close(out.float(), expected, length=columns if is_wide else 2, dtype=out_dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_equals_the_reference_exactly(device: Device, name: str) -> None:
    check_decoded(device, name)


def check_decoded(device: Device, name: str) -> None:
    source, values = random_source(name, 5, 512)
    for dtype in (torch.float16, torch.bfloat16):
        out = device.empty((5, 512), dtype)
        params = weight_params(device, repack([source]))
        device.run("dequantise", [out], **params, out=out, type=TYPES[dtype])
        assert torch.equal(out, values.to(dtype)), "not the same weights (0 and -0 are)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_exponent_of_mxfp4_is_exact(device: Device, dtype: torch.dtype) -> None:
    check_every_mxfp4(device, dtype)


def check_every_mxfp4(device: Device, dtype: torch.dtype) -> None:
    source, values = every_mxfp4(16, 512, most=255)
    out = device.empty((16, 512), dtype)
    device.run("dequantise", [out], **weight_params(device, repack([source])), out=out, type=TYPES[dtype])
    assert_equal(out, values.to(dtype))


def test_mxfp4_stays_at_four_bits_and_a_byte_per_block() -> None:
    source, _ = random_source("MXFP4", 32, 512)
    matrix = repack([source])
    assert (matrix.bits, matrix.nbytes) == (4, 32 * 512 // 32 * 17)
    assert matrix.nbytes == source.data.nbytes


@pytest.mark.parametrize(
    "changes", [{"has_wide_scales": True, "bits": 4}, {"bits": 8, "group": 16}, {"offsets": 1}], ids=str
)
def test_floats_with_other_scales_or_offsets_are_refused(device: Device, changes: dict[str, Any]) -> None:
    source, _ = random_source("MXFP4", 2, 64)
    params = weight_params(device, repack([source])) | changes
    with pytest.raises(AssertionError, match="refused"):
        device.launch("dequantise", **params, out=device.empty((2, 64), torch.float16), type=1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 3, 256), (3, 17, 1280), (21, 9, 512)])
def test_products_equal_the_reference(
    device: Device, name: str, tokens: int, rows: int, columns: int
) -> None:
    check_product(device, name, tokens, rows, columns)


def test_products_come_in_float32_and_float16_and_with_a_bias(device: Device) -> None:
    check_product(device, "Q8_0", 2, 10, 96, is_wide=True, has_bias=True)
    check_product(device, "Q4_K", 5, 10, 256, dtype=torch.float16, has_bias=True)


@pytest.mark.parametrize("name", ["Q8_0", "INT4_128"])
def test_products_are_added_to_float32(device: Device, name: str) -> None:
    check_product(device, name, 3, 19, 384, is_wide=True, is_added=True, has_bias=True)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "Q8_0", "INT4_128", "F8_128", "MXFP4"])
def test_products_in_float16_equal_the_reference(device: Device, name: str) -> None:
    check_product(device, name, 5, 19, 768, dtype=torch.float16)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "INT4_128", "F8_128", "MXFP4"])
def test_tiles_of_more_tokens_equal_the_reference(device: Device, name: str) -> None:
    """Blocks have one tile of rows or several; for 35 tokens, several passes over them."""
    for tokens, rows in ((12, 40), (16, 200), (35, 201)):
        check_product(device, name, tokens, rows, 256)
        device.reset()


@pytest.mark.parametrize(("name", "rows"), [("Q4_1", 8), ("INT4_128", 201), ("Q6_K", 129)])
def test_a_row_has_the_same_bits_in_any_batch(device: Device, name: str, rows: int) -> None:
    columns = {"Q4_1": 352, "INT4_128": 1408, "Q6_K": 256}[name]
    matrix = weight_params(device, repack([random_source(name, rows, columns)[0]]))
    a = device.tensor(torch.randn(35, columns).bfloat16())
    results = []
    for tokens in (1, 3, 8, 11, 35):
        out = device.empty((tokens, rows), torch.float32)
        device.run(
            "quant_linear", [out], **matrix, a=a, bias=None, out=out, num_tokens=tokens, is_wide=True,
            is_added=False, type=0,
        )  # fmt: skip
        results.append(out.clone())
    for result in results:
        assert torch.equal(result, results[-1][: len(result)])


def test_sources_are_stacked_by_rows() -> None:
    first, second = (random_source("Q6_K", rows, 256)[0] for rows in (3, 2))
    both = repack([first, second])
    assert both.shape == (5, 256)
    assert torch.equal(both.codes[:3], repack([first]).codes)
    assert torch.equal(both.scales[:, 3:5], repack([second]).scales[:, :2])
    assert both.scales.shape == (16, 16)
    assert not both.scales[:, 5:].any()


@pytest.mark.parametrize(
    "names",
    [("Q4_K", "Q6_K"), ("Q5_K", "Q8_0"), ("Q4_0", "Q4_1", "Q5_0"), ("INT4_128", "Q8_0"), ("MXFP4", "Q6_K")],
    ids=str,
)
def test_rows_of_different_formats_become_one_matrix(device: Device, names: tuple[str, ...]) -> None:
    sources, values = zip(*(random_source(name, 3, 512) for name in names), strict=True)
    both = repack(sources)
    assert (both.shape, both.bits) == ((3 * len(names), 512), 8)
    for dtype in (torch.float16, torch.bfloat16):
        out = device.empty(both.shape, dtype)
        device.run("dequantise", [out], **weight_params(device, both), out=out, type=TYPES[dtype])
        assert torch.equal(out, torch.cat(values).to(dtype)), "not the same weights (0 and -0 are)"


def test_every_format_of_the_cpu_stays_in_codes() -> None:
    floats = {"F32", "F16", "BF16"}
    assert all(can_repack([empty_source(name)]) for name, row in TABLE.items() if row.is_quantised)
    assert not any(can_repack([empty_source("Q8_0"), empty_source(name)]) for name in floats)
    for names, can in {
        ("INT4_64", "Q6_K"): True, ("F8_64", "F8_64"): True, ("F8_64", "Q6_K"): False,
        ("F8_64", "F8_32"): False,
    }.items():  # fmt: skip
        assert can_repack([empty_source(name) for name in names]) is can


def empty_source(name: str, order: Sequence[int] | None = None) -> WeightSource:
    wanted = None if order is None else np.array(order, np.int64)
    return WeightSource(np.zeros(0, np.uint8), name, (0, 512), wanted)


def test_columns_of_one_matrix_must_lie_in_one_order() -> None:
    up, down = list(range(512)), list(range(512))[::-1]
    assert can_repack([empty_source("INT4_64", down), empty_source("INT4_128", down)])
    assert not can_repack([empty_source("INT4_64", up), empty_source("INT4_64", down)])
    assert not can_repack([empty_source("INT4_64"), empty_source("INT4_64", down)])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_groups_that_lie_apart_are_multiplied_by_their_codes(bits: int, tokens: int) -> None:
    """GPTQ's act-order: few tokens use the codes, many use the decoded matrix."""
    library.require()
    bindings.install()
    rows, columns, num_groups = 24, 256, 4
    groups = (torch.arange(columns) * num_groups // columns)[torch.randperm(columns)]
    codes = torch.randint(1 << bits, (rows, columns), dtype=torch.uint8)
    scales, zeros = (torch.rand(rows, num_groups) * 0.1).half().float(), torch.full((rows, num_groups), 8)
    if bits == 8:
        zeros += 120
    values = scales.double()[:, groups] * (codes.double() - zeros.double()[:, groups])
    packed = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    matrix = IntegerMatrix(
        packed.numpy(), scales.numpy(), zeros.to(torch.uint8).numpy(), bits, groups.numpy()
    )
    made = matrix.by_group()
    assert made is not None
    source = integer_source(made[0].codes, made[0].scales, made[0].zeros, bits, made[1])
    assert source is not None
    weight = linear_weight(source, Repacking(torch.float32)).made.matrix
    assert isinstance(weight, CudaQuantMatrix)
    assert weight.nbytes < rows * columns * (bits + 2) / 8 + 8 * columns
    assert torch.equal(weight.plain(torch.float16).double(), values.half().double())
    a, out = torch.randn(tokens, columns).half(), torch.empty(tokens, rows)
    linear = QuantLinear(
        weight, None, Scratch(torch.float16, a.device, rows * columns), is_batch_invariant=False
    )
    launches = LaunchList((Size.TOKENS,), ())
    linear.multiply(launches, a, out, Size.TOKENS)
    launches.finish()
    launches.run((tokens,), ())
    length, dtype = (columns, torch.float32) if tokens < 100 else (2, torch.float16)
    assert_close(out, a.double() @ values.T, length=length, dtype=dtype)
    on_cpu = linear_weight(source, Packing(is_exact=True)).made
    expected = values.float().numpy()[:, on_cpu.order.indices]
    assert np.array_equal(on_cpu.matrix.unpack()[:rows], expected), "a CPU keeps the codes, too"


def test_groups_of_different_sizes_are_not_put_side_by_side() -> None:
    ones = np.ones((1, 2), np.float32)
    groups = np.array([0, 1, 1, 1])
    matrix = IntegerMatrix(np.zeros((1, 2), np.uint8), ones, ones.astype(np.uint8), 4, groups)
    assert matrix.by_group() is None


def check_passes(device: Device) -> None:
    """Multiply by 44 tiles of rows: six blocks with seven or eight, whose sums take two passes."""
    check_product(device, "INT4_128", 3, 700, 1152)


def test_blocks_pass_over_more_tiles_than_they_have_room_for(device: Device) -> None:
    check_passes(device)
