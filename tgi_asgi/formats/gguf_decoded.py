"""Decode ggml's types that no kernel multiplies into ones that a kernel does, or into floats.

    TQ1_0, TQ2_0, Q1_0, Q2_0         Q4_0: the same values
    IQ1_S, IQ2_XXS, IQ3_XXS, IQ3_S   Q8_0: scales are rounded to float16 (at most one part in 2,048)
    IQ1_M, IQ2_XS, IQ2_S, NVFP4      float32: two scales in 32 columns, which no block of eight bits holds

Used by `models/loading/gguf.py`; knows neither torch nor files. Source: ggml-quants.c.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.formats.codes import Bytes, Floats
from tgi_asgi.formats.gguf_grids import grid
from tgi_asgi.formats.small_floats import decode_e4m3, decode_fp4

_CHUNK_BLOCKS = 1 << 12  # a million weights: bounds the temporary arrays of a thread
_MAX_THREADS = 16  # bounds the temporary arrays, too
_HELD_BYTES = {"Q4_0": 18, "Q8_0": 34, "F32": 128}  # of 32 columns

Decoded = tuple[Floats, npt.NDArray[np.int8]]  # scales [n, m], codes [n, m, columns of a scale]


@dataclass(frozen=True, slots=True)
class DecodedType:
    """A type of GGUF files that is decoded while it is loaded.

    Attributes:
        held: The format that it is decoded to: Q4_0, Q8_0 or F32.
        decode: Return scales and codes, or weights, of blocks [n, block_bytes].
    """

    name: str
    block_columns: int
    block_bytes: int
    held: str
    decode: Callable[[Bytes], Decoded | Floats]

    def convert(self, data: Bytes) -> Bytes:
        """Return the bytes of the format `held` for whole blocks."""
        blocks = data.reshape(-1, self.block_bytes)
        out = np.empty((len(blocks), self.block_columns // 32 * _HELD_BYTES[self.held]), np.uint8)

        def convert_from(at: int) -> None:
            chunk = slice(at, at + _CHUNK_BLOCKS)
            out[chunk] = _held(self.decode(np.ascontiguousarray(blocks[chunk])), self.held)

        # numpy computes without the GIL.
        with ThreadPoolExecutor(min(_C.num_threads(), _MAX_THREADS), initializer=_use_all_cores) as threads:
            for _ in threads.map(convert_from, range(0, len(blocks), _CHUNK_BLOCKS)):
                pass
        return out.reshape(-1)


def _use_all_cores() -> None:
    """Undo what this thread inherits from the one that loads, which stays on one core."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # the cores may have been taken away since
            os.sched_setaffinity(0, _C.usable_cores())


def _held(decoded: Decoded | Floats, held: str) -> Bytes:
    """Return decoded blocks as bytes of Q4_0, Q8_0 or F32: [n, bytes of a block]."""
    if not isinstance(decoded, tuple):
        return np.ascontiguousarray(decoded, np.float32).reshape(len(decoded), -1).view(np.uint8)
    scales, codes = decoded
    num_blocks = len(scales)
    codes = codes.reshape(-1, 32)
    with np.errstate(over="ignore"):
        halves = np.repeat(scales.reshape(-1), codes.shape[0] // scales.size).astype(np.float16)
    out = np.empty((len(codes), 34 if held == "Q8_0" else 18), np.uint8)
    out[:, :2] = halves[:, None].view(np.uint8)
    if held == "Q8_0":
        out[:, 2:] = codes.view(np.uint8)
    else:
        nibbles = (codes + np.int8(8)).view(np.uint8)
        out[:, 2:] = nibbles[:, :16] | nibbles[:, 16:] << np.uint8(4)
    return out.reshape(num_blocks, -1)


def _weights(scales: Floats, codes: npt.NDArray[np.int8]) -> Floats:
    """Return the weights of groups of columns: scales [n, m] times codes [n, columns]."""
    weights = codes.reshape(*scales.shape, -1).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file may have any scales
        weights *= scales[..., None]
    return weights


def _halves(data: Bytes) -> Floats:
    """Return each block's scale [n, 1] from its two bytes."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Return the two halves of each byte [n, m], the low one first: [n, 2 * m]."""
    return np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1)


def _signs(bits: Bytes) -> npt.NDArray[np.int8]:
    """Return -1 for each bit that is set, else 1: [n, 8m]."""
    found = np.unpackbits(np.ascontiguousarray(bits), axis=1, bitorder="little")
    return np.int8(1) - np.int8(2) * found.view(np.int8)


def _with_parity(sevens: Bytes) -> Bytes:
    """Add an eighth bit to seven bits of signs, so that their number is even."""
    ones = np.unpackbits(sevens[..., None], axis=-1).sum(axis=-1, dtype=np.uint8)
    found: Bytes = sevens | (ones & np.uint8(1)) << np.uint8(7)
    return found


def _sign_bytes(words: npt.NDArray[np.uint32]) -> Bytes:
    """Return the four bytes of signs that a word has in its low 28 bits, seven each: [n, 4 * words]."""
    sevens = (words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & np.uint32(127)).astype(np.uint8)
    return _with_parity(sevens).reshape(len(words), -1)


def _ternary(count: int, data: Bytes) -> Bytes:
    """Return the digits of base three that bytes hold, byte * 3^i * 3 >> 8, place by place."""
    powers = (3 ** np.arange(count)).astype(np.uint8)
    shifted = data[:, None, :] * powers[:, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(data), -1)


def _tq1_0(blocks: Bytes) -> Decoded:
    parts = [_ternary(5, blocks[:, :32]), _ternary(5, blocks[:, 32:48]), _ternary(4, blocks[:, 48:52])]
    return _halves(blocks[:, 52:]), np.concatenate(parts, axis=1).view(np.int8) - np.int8(1)


def _two_bits(data: Bytes, run: int) -> npt.NDArray[np.int8]:
    """Return codes of two bits minus one; each byte of a run holds columns that are a run apart."""
    places = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = data.reshape(len(data), -1, 1, run) >> places & np.uint8(3)
    return codes.reshape(len(data), -1).view(np.int8) - np.int8(1)


def _tq2_0(blocks: Bytes) -> Decoded:
    return _halves(blocks[:, 64:]), _two_bits(blocks[:, :64], 32)


def _q2_0(blocks: Bytes) -> Decoded:
    return _halves(blocks[:, :2]), _two_bits(blocks[:, 2:], 1)


def _q1_0(blocks: Bytes) -> Decoded:
    return _halves(blocks[:, :2]), -_signs(blocks[:, 2:])


def _iq2_xxs(blocks: Bytes) -> Decoded:
    words = np.ascontiguousarray(blocks[:, 2:]).view(np.uint32).reshape(len(blocks), 8, 2)
    indices = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    codes = grid("IQ2_XXS")[indices].reshape(len(blocks), 256) * _signs(_sign_bytes(words[..., 1]))
    return _halves(blocks[:, :2]) * (0.5 + (words[..., 1] >> 28)).astype(np.float32) * 0.25, codes


def _iq2_xs(blocks: Bytes) -> Floats:
    words = np.ascontiguousarray(blocks[:, 2:66]).view(np.uint16)
    signs = _signs(_with_parity((words >> 9).astype(np.uint8)))
    codes = grid("IQ2_XS")[words & 511].reshape(len(blocks), 256) * signs
    return _weights(
        _halves(blocks[:, :2]) * (0.5 + _nibbles(blocks[:, 66:])).astype(np.float32) * 0.25, codes
    )


def _iq2_s(blocks: Bytes) -> Floats:
    places = np.array([0, 2, 4, 6], np.uint8)
    high = (blocks[:, 66:74, None] >> places & np.uint8(3)).reshape(len(blocks), 32)
    indices = blocks[:, 2:34] | high.astype(np.uint16) << 8
    codes = grid("IQ2_S")[indices].reshape(len(blocks), 256) * _signs(blocks[:, 34:66])
    return _weights(
        _halves(blocks[:, :2]) * (0.5 + _nibbles(blocks[:, 74:])).astype(np.float32) * 0.25, codes
    )


def _iq3_xxs(blocks: Bytes) -> Decoded:
    words = np.ascontiguousarray(blocks[:, 66:]).view(np.uint32)
    codes = grid("IQ3_XXS")[blocks[:, 2:66]].reshape(len(blocks), 256) * _signs(_sign_bytes(words))
    return _halves(blocks[:, :2]) * (0.5 + (words >> 28)).astype(np.float32) * 0.5, codes


def _iq3_s(blocks: Bytes) -> Decoded:
    high = np.unpackbits(np.ascontiguousarray(blocks[:, 66:74]), axis=1, bitorder="little")
    indices = blocks[:, 2:66] | high.astype(np.uint16) << 8
    codes = grid("IQ3_S")[indices].reshape(len(blocks), 256) * _signs(blocks[:, 74:106])
    return _halves(blocks[:, :2]) * (1 + 2 * _nibbles(blocks[:, 106:])).astype(np.float32), codes


def _iq1_s(blocks: Bytes) -> Decoded:
    """Decode to eighths: a weight is -1, 0 or 1, plus or minus an eighth."""
    words = np.ascontiguousarray(blocks[:, 34:]).view(np.uint16)
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(blocks), 32)
    eighths = grid("IQ1_S")[blocks[:, 2:34] | high << 8].reshape(len(blocks), 8, 32) * np.int8(8)
    shifts = np.where(words & 0x8000, np.int8(-1), np.int8(1))
    scales = _halves(blocks[:, :2]) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    return scales * np.float32(0.125), eighths + shifts[..., None]


def _iq1_m(blocks: Bytes) -> Floats:
    words = np.ascontiguousarray(blocks[:, 48:]).view(np.uint16)
    parts = (words & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    scale = np.bitwise_or.reduce(parts, axis=1).view(np.float16).astype(np.float32)[:, None]
    steps = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(blocks), 16)
    high = _nibbles(blocks[:, 32:48])
    indices = blocks[:, :32] | (high & 7).astype(np.uint16) << 8
    eighths = grid("IQ1_S")[indices] * np.int8(8) + np.where(high & 8, np.int8(-1), np.int8(1))[..., None]
    return _weights(scale * (2 * steps + 1).astype(np.float32) * np.float32(0.125), eighths)


def _nvfp4(blocks: Bytes) -> Floats:
    scale_codes = blocks[:, :4] & np.uint8(127)  # ggml's scales have no sign, and no NaN
    scales = decode_e4m3(np.where(scale_codes == 127, np.uint8(0), scale_codes))
    codes = blocks[:, 4:].reshape(len(blocks), 4, 8)
    pairs = np.concatenate([codes & 15, codes >> 4], axis=2)  # columns 0 to 15 of each group
    packed = pairs[..., 0::2] | pairs[..., 1::2] << np.uint8(4)
    return decode_fp4(packed.reshape(len(blocks), 32), scales)


DECODED = {
    16: DecodedType("IQ2_XXS", 256, 66, "Q8_0", _iq2_xxs),
    17: DecodedType("IQ2_XS", 256, 74, "F32", _iq2_xs),
    18: DecodedType("IQ3_XXS", 256, 98, "Q8_0", _iq3_xxs),
    19: DecodedType("IQ1_S", 256, 50, "Q8_0", _iq1_s),
    21: DecodedType("IQ3_S", 256, 110, "Q8_0", _iq3_s),
    22: DecodedType("IQ2_S", 256, 82, "F32", _iq2_s),
    29: DecodedType("IQ1_M", 256, 56, "F32", _iq1_m),
    34: DecodedType("TQ1_0", 256, 54, "Q4_0", _tq1_0),
    35: DecodedType("TQ2_0", 256, 66, "Q4_0", _tq2_0),
    40: DecodedType("NVFP4", 64, 36, "F32", _nvfp4),
    41: DecodedType("Q1_0", 128, 18, "Q4_0", _q1_0),
    42: DecodedType("Q2_0", 64, 18, "Q4_0", _q2_0),
}
BY_NAME = {row.name: row for row in DECODED.values()}
