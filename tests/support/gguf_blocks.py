"""Random matrices in every format of GGUF files, with their values according to the `gguf` package.

All bits of a block are random, except the numbers that determine the size of its weights. These give each
matrix a mean of about zero and the requested standard deviation. Nothing here uses the server's code.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Block:
    """Offsets of a block's scale and of its additive term (ggml-common.h)."""

    columns: int
    nbytes: int
    scale: int  # offset of the scale, in fp16
    offset: int | None = None  # offset of the additive term, in fp16
    centre: float = 0.0  # the mean code, which the additive term must cancel
    sign: int = 1  # sign of the additive term: k-quants subtract it


_BLOCKS = {
    "Q4_0": _Block(32, 18, 0),
    "Q4_1": _Block(32, 20, 0, 2, 7.5, -1),
    "Q5_0": _Block(32, 22, 0),
    "Q5_1": _Block(32, 24, 0, 2, 15.5, -1),
    "Q8_0": _Block(32, 34, 0),
    "Q8_1": _Block(32, 36, 0),
    "Q2_K": _Block(256, 84, 80, 82, 1.5),
    "Q3_K": _Block(256, 110, 108),
    "Q4_K": _Block(256, 144, 0, 2, 7.5),
    "Q5_K": _Block(256, 176, 0, 2, 15.5),
    "Q6_K": _Block(256, 210, 208),
    "IQ1_S": _Block(256, 50, 0),
    "IQ2_XXS": _Block(256, 66, 0),
    "IQ2_XS": _Block(256, 74, 0),
    "IQ2_S": _Block(256, 82, 0),
    "IQ3_XXS": _Block(256, 98, 0),
    "IQ3_S": _Block(256, 110, 0),
    "IQ4_NL": _Block(32, 18, 0),
    "IQ4_XS": _Block(256, 136, 0),
}
_CONVERTED = {
    "TQ1_0": _Block(256, 54, 52),
    "TQ2_0": _Block(256, 66, 64),
    "Q1_0": _Block(128, 18, 0),
}
_FLOATS = ("F32", "F16", "BF16")
FORMATS = ("F16", "BF16", *_BLOCKS, "IQ1_M", "MXFP4")  # without F32, which is compared with nothing
CONVERTED = (*_CONVERTED, "NVFP4")  # that the server converts while it loads them


@dataclass(frozen=True, slots=True)
class GgufMatrix:
    """A matrix as a file stores it."""

    format: str
    data: Bytes  # [rows, bytes of a row]
    values: Floats  # [rows, columns]

    @property
    def ggml_type(self) -> int:
        return int(gguf.GGMLQuantizationType[self.format])


def random_matrix(
    format: str, rows: int, columns: int, deviation: float, random: np.random.Generator
) -> GgufMatrix:
    """Make a matrix of random blocks whose weights have this standard deviation, or about it in MXFP4."""
    if format in _FLOATS:
        values = (random.standard_normal((rows, columns)) * deviation).astype(np.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[format]).view(np.uint8)
        return GgufMatrix(format, data.reshape(rows, -1), decoded_values(format, data.reshape(rows, -1)))
    if format == "MXFP4":
        data = _mxfp4_blocks(rows, columns, deviation, random)
    elif format == "NVFP4":
        data = _nvfp4_blocks(rows, columns, deviation, random)
    elif format == "IQ1_M":
        data = _iq1_m_blocks(rows, columns, deviation, random)
    else:
        block = _BLOCKS.get(format) or _CONVERTED[format]
        data = _scaled_blocks(block, format, rows, columns, deviation, random)
    return GgufMatrix(format, data, decoded_values(format, data))


def decoded_values(format: str, data: Bytes) -> Floats:
    """Return the values of rows of bytes: [rows, columns] float32."""
    if format == "Q8_1":  # `gguf` does not read it: a scale, then a redundant sum
        blocks = data.reshape(-1, 36)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return (scales * blocks[:, 4:].view(np.int8)).reshape(len(data), -1)
    if format == "Q1_0":  # nor this: a scale, then a bit per weight, set for plus (ggml-quants.c)
        blocks = data.reshape(-1, 18)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        signs = 2.0 * np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") - 1
        return (scales * signs).astype(np.float32).reshape(len(data), -1)
    # As one row, because `gguf` takes rows in groups of sixteen, each of which costs as much as all.
    values: Floats = gguf.quants.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType[format])
    return values.astype(np.float32).reshape(len(data), -1)


def _scaled_blocks(
    block: _Block, format: str, rows: int, columns: int, deviation: float, random: np.random.Generator
) -> Bytes:
    shape = (rows, columns // block.columns)
    data = random.integers(0, 256, (*shape, block.nbytes), np.uint8)
    scales = random.uniform(0.5, 1.5, shape) * random.choice([-1.0, 1.0], shape)
    moves = scales * block.centre * block.sign * random.uniform(0.9, 1.1, shape)

    def filled(unit: float) -> Bytes:
        _put(data, block.scale, scales * unit)
        if block.offset is not None:
            _put(data, block.offset, moves * unit)
        return data.reshape(rows, -1)

    return filled(deviation / float(decoded_values(format, filled(2.0**-6)).std()) * 2.0**-6)


def _put(data: Bytes, offset: int, numbers: npt.NDArray[np.float64]) -> None:
    data[..., offset : offset + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)


def _mxfp4_blocks(rows: int, columns: int, deviation: float, random: np.random.Generator) -> Bytes:
    """Make blocks of E2M1, whose standard deviation is about 3, with exponents that differ by one or two."""
    data = random.integers(0, 256, (rows, columns // 32, 17), np.uint8)
    data[..., 0] = 127 + round(np.log2(deviation / 3)) + random.integers(-1, 2, data.shape[:2])
    return data.reshape(rows, -1)


def _nvfp4_blocks(rows: int, columns: int, deviation: float, random: np.random.Generator) -> Bytes:
    """Make blocks of E2M1 with four scales each, E4M3 without sign, around the wanted size."""
    data = random.integers(0, 256, (rows, columns // 64, 36), np.uint8)
    middle = 8 * (7 + round(np.log2(deviation / 3)))
    data[..., :4] = np.clip(middle + random.integers(-6, 7, (*data.shape[:2], 4)), 1, 126)
    return data.reshape(rows, -1)


def _iq1_m_blocks(rows: int, columns: int, deviation: float, random: np.random.Generator) -> Bytes:
    """Make blocks whose scale lies in the highest four bits of four words."""
    shape = (rows, columns // 256)
    data = random.integers(0, 256, (*shape, 56), np.uint8)
    halves = (random.uniform(0.5, 1.5, shape) * deviation / 8).astype(np.float16).view(np.uint16)
    words = data[..., 48:].view(np.uint16)
    words &= 0x0FFF
    words |= (halves[..., None] >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12
    return data.reshape(rows, -1)
