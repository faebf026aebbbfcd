"""The table of weight formats, read from csrc/formats.def, and the conversion of other encodings to blocks.

Quantised safetensors store codes, scales and zero points as separate tensors. They are converted to rows of
blocks like ggml's, so that rows of every format can be moved in the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C

_Array = npt.NDArray[Any]
RUNS = (128, 64, 32)  # columns per block of INT4 or F8, largest first
FORMATS: dict[str, _C.WeightFormat] = {row.name: row for row in _C.formats()}


def int4_blocks(codes: _Array, scales: _Array, zeros: _Array) -> tuple[_Array, str] | None:
    """Make blocks of weights scale * (code - zero); return None if no format can hold them.

    Groups must be multiples of 32 columns, scales must be exact in float16, and zero points at most 128.

    Args:
        codes: [rows, columns / 2] uint8, the first of each pair in the low half.
        scales, zeros: [rows, num_groups] float32 and uint8, groups of equal size.

    Returns:
        The bytes, flat, and the name of their format.
    """
    rows, group = codes.shape[0], codes.shape[1] * 2 // scales.shape[1]
    run = next((run for run in RUNS if group % run == 0), None)
    if run is None or not _are_halves(scales) or (zeros > 128).any():
        return None
    name, num_runs = f"INT4_{run}", codes.shape[1] * 2 // run
    blocks = np.zeros((rows, num_runs, FORMATS[name].block_bytes), np.uint8)
    repeats = num_runs // scales.shape[1]
    blocks[..., :2] = np.repeat(scales.astype(np.float16), repeats, axis=1)[..., None].view(np.uint8)
    blocks[..., 2] = np.repeat(zeros, repeats, axis=1)
    blocks[..., 4:] = codes.reshape(rows, num_runs, run // 2)
    return blocks.reshape(-1), name


def int8_blocks(codes: _Array, scales: _Array, zeros: _Array) -> tuple[_Array, str] | None:
    """Make Q8_0 blocks of codes [rows, columns], otherwise as `int4_blocks`; None if Q8_0 cannot hold them.

    Zero points must be 128, and scales must be exact in float16.
    """
    rows, columns = codes.shape
    repeats, rest = divmod(columns // scales.shape[1], 32)
    if rest or (zeros != 128).any() or not _are_halves(scales):
        return None
    blocks = np.empty((rows, columns // 32, 34), np.uint8)
    blocks[..., :2] = np.repeat(scales.astype(np.float16), repeats, axis=1)[..., None].view(np.uint8)
    blocks[..., 2:] = (codes ^ 128).reshape(rows, -1, 32)
    return blocks.reshape(-1), "Q8_0"


def float8_blocks(codes: _Array, scales: _Array) -> tuple[_Array, str]:
    """Make blocks of E4M3 codes [rows, columns] uint8 with scales [rows, columns / run] float32."""
    rows, num_runs = scales.shape
    run = codes.shape[1] // num_runs
    blocks = np.empty((rows, num_runs, 4 + run), np.uint8)
    blocks[..., :4] = scales[..., None].view(np.uint8)
    blocks[..., 4:] = codes.reshape(rows, num_runs, run)
    return blocks.reshape(-1), f"F8_{run}"


def _are_halves(scales: _Array) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
