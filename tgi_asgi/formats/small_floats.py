"""Decode weights of 8 and 4 bits that are floats: FP8, NVFP4, MXFP4, and bitsandbytes' tables.

Used by `models/loading`; knows neither torch nor files.
Sources: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats (MX) Specification 1.0;
compressed-tensors' nvfp4/helpers.py; bitsandbytes' functional.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.codes import Bytes, Floats
from tgi_asgi.formats.files import parse_json_object

_MAX_OFFSET = 1e30  # of bitsandbytes' nested scales; a float32 holds little more
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)


def decode_e4m3(codes: Bytes) -> Floats:
    """Return the values of E4M3 codes (the variant without infinities)."""
    return _e4m3_table()[codes]


def decode_e8m0(codes: Bytes) -> Floats:
    """Return the powers of two that E8M0 codes stand for; the code 255 is NaN."""
    exponents = codes.astype(np.int32)
    powers = np.ldexp(np.float32(1.0), np.minimum(exponents, 254) - 127)
    return np.where(exponents == 255, np.float32(np.nan), powers).astype(np.float32)


def _e4m3_table() -> Floats:
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    normal = (1 + fractions / 8) * 2.0 ** (exponents - 7)
    values = np.where(exponents == 0, fractions * 2.0**-9, normal)
    values[(codes & 127) == 127] = np.nan
    table: Floats = np.where(codes < 128, values, -values).astype(np.float32)
    return table


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Scales of a matrix: column c of row r has values[r, c // run]."""

    values: Floats  # [rows, n]
    run: int

    def spread(self, columns: int) -> Floats:
        """Return the scale of each weight."""
        return self.values[:, np.arange(columns) // self.run]

    def by_run(self, run: int, columns: int) -> Floats:
        """Return scales for shorter runs, which divide these: [rows, columns / run]."""
        return np.ascontiguousarray(self.values[:, np.arange(0, columns, run) // self.run])


def float8_scales(scales: Floats, block: tuple[int, int] | None, shape: tuple[int, int]) -> ScaleGrid:
    """Return FP8 scales of any granularity in a file.

    Args:
        scales: One for the matrix, one per row, one per block of `block` rows and columns, or one per row and
            group of columns.

    Raises:
        ModelLoadError: if there are other numbers of them.
    """
    rows, columns = shape
    if scales.size == 1:
        return ScaleGrid(np.full((rows, 1), scales.reshape(()), np.float32), columns)
    if scales.ndim == 4 and scales.shape[1] == scales.shape[3] == 1:  # ModelOpt's blocks
        scales = scales.reshape(scales.shape[0], scales.shape[2])
    if scales.shape in ((rows,), (rows, 1)):
        return ScaleGrid(scales.reshape(rows, 1), columns)
    if block is not None and scales.shape == (-(-rows // block[0]), -(-columns // block[1])):
        return ScaleGrid(scales[np.arange(rows) // block[0]], block[1])
    if scales.ndim == 2 and scales.shape[0] == rows and scales.size and columns % scales.shape[1] == 0:
        return ScaleGrid(scales, columns // scales.shape[1])
    check(block is not None, f"scales of shape {scales.shape} need `weight_block_size`")
    raise ModelLoadError(f"scales of shape {scales.shape} do not fit blocks of {block} in {shape}")


def fp4_run(packed: Bytes, scales: Floats) -> int:
    """Return how many columns share a scale; the arguments are those of `decode_fp4`.

    Raises:
        ModelLoadError: if the scales do not fit the codes.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    check(
        scales.ndim == 2
        and scales.shape[0] == rows
        and min(columns, scales.size) > 0
        and columns % scales.shape[1] == 0,
        f"scales of shape {scales.shape} do not fit {rows} rows of {columns} columns",
    )
    return int(columns // scales.shape[1])


def decode_fp4(packed: Bytes, scales: Floats) -> Floats:
    """Return weights of nibbles [rows, columns / 2], the low half first, and scales [rows, num_groups]."""
    rows, columns, run = packed.shape[0], packed.shape[1] * 2, fp4_run(packed, scales)
    values = _C.decode_nibbles(packed.reshape(-1), rows * columns, False, _E2M1, scales.reshape(-1), run)
    return values.reshape(rows, columns)


def fp4_blocks(packed: Bytes, scales: Floats) -> Bytes:
    """Return blocks of FP4_16, whose scales are float16: see `holds_fp4_scales`.

    Args:
        packed: [rows, columns / 2] codes of E2M1, the first of two columns in the low half.
        scales: [rows, columns / 16].
    """
    halves = (scales.reshape(-1, 2) / 2).astype(np.float16)  # the kernels' values are doubled
    return np.concatenate([halves.view(np.uint8), packed.reshape(-1, 16)], axis=1)


def holds_fp4_scales(scales: Floats) -> bool:
    """Return whether float16 holds half of each scale to within one part in 2,048 of the largest."""
    largest = np.abs(scales).max(initial=0.0) / 2
    return bool(np.finfo(np.float16).tiny <= largest <= np.finfo(np.float16).max)


def mxfp4_blocks(codes: Bytes, exponents: Bytes) -> Bytes:
    """Return ggml's blocks of MXFP4: the exponent, then byte i with columns i and i + 16 of 32.

    Args:
        codes: [..., 16], byte i with columns 2i, the low half, and 2i + 1.
        exponents: [...], E8M0.
    """
    out = np.empty((*codes.shape[:-1], 17), np.uint8)
    out[..., 0] = exponents
    first, second = codes[..., :8], codes[..., 8:]  # columns 0 to 15 and 16 to 31, two per byte
    out[..., 1::2] = (first & np.uint8(0x0F)) | (second << np.uint8(4))
    out[..., 2::2] = (first >> np.uint8(4)) | (second & np.uint8(0xF0))
    return out


@dataclass(frozen=True, slots=True)
class TableState:
    """What bitsandbytes keeps beside a matrix of four-bit codes.

    Attributes:
        shape: Rows and columns.
        block: Number of weights per scale, in the order of rows.
        offset, nested_block: Of scales that are codes themselves; a block of 0 if they are not.
    """

    shape: tuple[int, int]
    block: int
    nested_block: int = 0
    offset: float = 0.0

    @classmethod
    def from_json(cls, data: bytes) -> TableState:
        """Read the tensor `quant_state.bitsandbytes__nf4` or `..._fp4`.

        Raises:
            ModelLoadError: if it is damaged.
        """
        try:
            state: Any = parse_json_object(data)
        except ModelLoadError as error:
            raise ModelLoadError(f"bitsandbytes' quant_state: {error}") from None
        shape, block, nested = state.get("shape"), state.get("blocksize"), state.get("nested_blocksize", 0)
        offset = state.get("nested_offset", 0.0)
        check(
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(each) is int and 0 < each < 1 << 31 for each in (*shape, block))
            and type(nested) is int
            and 0 <= nested < 1 << 31
            and type(offset) in (int, float)
            and abs(offset) < _MAX_OFFSET,
            f"bitsandbytes' quant_state has unknown values: {str(state)[:200]}",
        )
        return cls((shape[0], shape[1]), block, nested, float(offset))


def decode_table(packed: Bytes, state: TableState, parts: Mapping[str, npt.NDArray[Any]]) -> Floats:
    """Return the weights of bitsandbytes' NF4 or FP4 codes, two a byte, the first in the high half.

    Args:
        packed: Bytes in any shape.
        parts: `absmax` and `quant_map`; with `nested_absmax` and `nested_quant_map` if `absmax` is codes.
    """
    count = state.shape[0] * state.shape[1]
    table, scales = parts["quant_map"], parts["absmax"].reshape(-1)
    num_blocks = -(-count // state.block)
    check(table.shape == (16,) and packed.size * 2 - count in (0, 1), "quant_map or codes do not fit")
    if state.nested_block:
        nested, values = parts["nested_absmax"].reshape(-1), parts["nested_quant_map"].reshape(-1)
        check(
            scales.dtype == np.uint8
            and values.size == 256
            and nested.size * state.nested_block >= scales.size,
            "absmax and nested_absmax do not fit",
        )
        by_block = nested[np.arange(scales.size) // state.nested_block]
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged file may have any scales
            scales = values[scales] * by_block + np.float32(state.offset)
    check(scales.size == num_blocks, f"absmax has {scales.size} scales, not {num_blocks}")
    weights = _C.decode_nibbles(
        packed.reshape(-1), count, True, np.ascontiguousarray(table, np.float32),
        np.ascontiguousarray(scales, np.float32), state.block,
    )  # fmt: skip
    return weights.reshape(state.shape)
