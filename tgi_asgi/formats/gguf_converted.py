"""Convert ggml's types that no kernel multiplies into blocks of formats that have one.

    TQ1_0, TQ2_0, Q1_0, Q2_0   Q4_0: the same values
    NVFP4                      FP4_16: the same values

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
from tgi_asgi.formats.codes import Bytes
from tgi_asgi.formats.small_floats import decode_e4m3, fp4_blocks

_CHUNK_BLOCKS = 1 << 12  # a million weights: bounds the temporary arrays of a thread
_MAX_THREADS = 16  # bounds the temporary arrays, too
_HELD = {row.name: row for row in _C.formats() if row.name in ("Q4_0", "FP4_16")}

Codes = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class ConvertedType:
    """A type of GGUF files that is converted while it is loaded.

    Attributes:
        held: The format that it is converted to.
        convert_blocks: Return the bytes of that format for blocks [n, block_bytes].
    """

    name: str
    block_columns: int
    block_bytes: int
    held: str
    convert_blocks: Callable[[Bytes], Bytes]

    def convert(self, data: Bytes) -> Bytes:
        """Return the bytes of the format `held` for whole blocks."""
        blocks = data.reshape(-1, self.block_bytes)
        held = _HELD[self.held]
        block_bytes = self.block_columns // held.block_columns * held.block_bytes
        out = np.empty((len(blocks), block_bytes), np.uint8)

        def convert_from(at: int) -> None:
            chunk = slice(at, at + _CHUNK_BLOCKS)
            out[chunk] = self.convert_blocks(np.ascontiguousarray(blocks[chunk])).reshape(-1, out.shape[1])

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


def _q4_0_blocks(scales: Bytes, codes: Codes) -> Bytes:
    """Return blocks of Q4_0 for codes [n, columns] of -8 to 7 and the bytes of each row's scale [n, 2]."""
    nibbles = (codes.reshape(len(codes), -1, 32) + np.int8(8)).view(np.uint8)
    out = np.empty((*nibbles.shape[:2], 18), np.uint8)
    out[..., :2] = scales[:, None]
    out[..., 2:] = nibbles[..., :16] | nibbles[..., 16:] << np.uint8(4)
    return out


def _ternary(count: int, data: Bytes) -> Bytes:
    """Return the digits of base three that bytes hold, byte * 3^i * 3 >> 8, place by place."""
    powers = (3 ** np.arange(count)).astype(np.uint8)
    shifted = data[:, None, :] * powers[:, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(data), -1)


def _tq1_0(blocks: Bytes) -> Bytes:
    parts = [_ternary(5, blocks[:, :32]), _ternary(5, blocks[:, 32:48]), _ternary(4, blocks[:, 48:52])]
    return _q4_0_blocks(blocks[:, 52:], np.concatenate(parts, axis=1).view(np.int8) - np.int8(1))


def _two_bits(data: Bytes, run: int) -> Codes:
    """Return codes of two bits minus one; each byte of a run holds columns that are a run apart."""
    places = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = data.reshape(len(data), -1, 1, run) >> places & np.uint8(3)
    return codes.reshape(len(data), -1).view(np.int8) - np.int8(1)


def _tq2_0(blocks: Bytes) -> Bytes:
    return _q4_0_blocks(blocks[:, 64:], _two_bits(blocks[:, :64], 32))


def _q2_0(blocks: Bytes) -> Bytes:
    return _q4_0_blocks(blocks[:, :2], _two_bits(blocks[:, 2:], 1))


def _q1_0(blocks: Bytes) -> Bytes:
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, 2:]), axis=1, bitorder="little")
    return _q4_0_blocks(blocks[:, :2], np.int8(2) * bits.view(np.int8) - np.int8(1))


def _nvfp4(blocks: Bytes) -> Bytes:
    scale_codes = blocks[:, :4] & np.uint8(127)  # ggml's scales have no sign, and no NaN
    scales = decode_e4m3(np.where(scale_codes == 127, np.uint8(0), scale_codes))
    codes = blocks[:, 4:].reshape(len(blocks), 4, 8)
    pairs = np.concatenate([codes & 15, codes >> 4], axis=2)  # columns 0 to 15 of each group
    packed = pairs[..., 0::2] | pairs[..., 1::2] << np.uint8(4)
    return fp4_blocks(packed.reshape(-1, 32), scales)


CONVERTED = {
    34: ConvertedType("TQ1_0", 256, 54, "Q4_0", _tq1_0),
    35: ConvertedType("TQ2_0", 256, 66, "Q4_0", _tq2_0),
    40: ConvertedType("NVFP4", 64, 36, "FP4_16", _nvfp4),
    41: ConvertedType("Q1_0", 128, 18, "Q4_0", _q1_0),
    42: ConvertedType("Q2_0", 64, 18, "Q4_0", _q2_0),
}
BY_NAME = {row.name: row for row in CONVERTED.values()}
