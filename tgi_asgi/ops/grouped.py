"""Weights of quantised safetensors as sources: rows of blocks like ggml's, so that rows can be moved alike.

A block of INT4 is a float32 scale, a zero point (a byte, padded to four) and the codes of 32, 64 or 128
columns; of F8 a float32 scale and as many E4M3 bytes. The CUDA kernels take these codes as they are. Those of
the CPU know ggml's formats: there INT4 becomes the one that holds every weight exactly, F8 is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch






_Array = npt.NDArray[Any]
RUNS = (128, 64, 32)  # columns of a block
_INT4_HEADER, _F8_HEADER = 8, 4  # bytes
GROUPED = {f"INT4_{run}": (run, _INT4_HEADER + run // 2) for run in RUNS} | {
    f"F8_{run}": (run, _F8_HEADER + run) for run in RUNS
}


def int4_blocks(codes: _Array, scales: _Array, zeros: _Array) -> tuple[_Array, str] | None:
    """Make blocks of weights scale * (code - zero); None if groups are no multiples of 32 columns.

    Args:
        codes: [rows, columns / 2] uint8, the first of two in the low half.
        scales, zeros: [rows, num_groups] float32 and uint8, groups of equal size.

    Returns:
        The bytes, flat, and the name of their format.
    """
    rows, group = codes.shape[0], codes.shape[1] * 2 // scales.shape[1]
    run = next((run for run in RUNS if group % run == 0), None)
    if run is None:
        return None
    num_runs = codes.shape[1] * 2 // run
    blocks = np.zeros((rows, num_runs, GROUPED[f"INT4_{run}"][1]), np.uint8)
    repeats = num_runs // scales.shape[1]
    blocks[..., :4] = np.repeat(scales, repeats, axis=1)[..., None].view(np.uint8)
    blocks[..., 4] = np.repeat(zeros, repeats, axis=1)
    blocks[..., _INT4_HEADER:] = codes.reshape(rows, num_runs, run // 2)
    return blocks.reshape(-1), f"INT4_{run}"


def int8_blocks(codes: _Array, scales: _Array, zeros: _Array) -> tuple[_Array, str] | None:
    """Make blocks of Q8_0 of codes [rows, columns], else as `int4_blocks`; None where they do not hold them.

    They hold zero points of 128, and scales of float16.
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
    blocks = np.empty((rows, num_runs, GROUPED[f"F8_{run}"][1]), np.uint8)
    blocks[..., :_F8_HEADER] = scales[..., None].view(np.uint8)
    blocks[..., _F8_HEADER:] = codes.reshape(rows, num_runs, run)
    return blocks.reshape(-1), f"F8_{run}"


def read_int4(blocks: _Array) -> tuple[_Array, _Array, _Array]:
    """Return codes, scales [blocks] float32 and zero points [blocks] uint8 of blocks [blocks, bytes]."""
    scales = np.ascontiguousarray(blocks[:, :4]).view(np.float32).reshape(-1)
    return blocks[:, _INT4_HEADER:], scales, blocks[:, 4]


def read_float8(blocks: _Array) -> tuple[_Array, _Array]:
    """Return codes and scales [blocks] float32 of blocks [blocks, bytes]."""
    scales = np.ascontiguousarray(blocks[:, :_F8_HEADER]).view(np.float32).reshape(-1)
    return blocks[:, _F8_HEADER:], scales


def decode_grouped(data: npt.NDArray[np.uint8], format: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the weights of a source's bytes, each rounded once."""
    blocks = data.reshape(-1, GROUPED[format][1])
    if format.startswith("INT4"):
        codes, scales, zeros = read_int4(blocks)
        weights = _unpaired(codes).astype(np.float32)
        weights -= zeros[:, None]
    else:
        codes, scales = read_float8(blocks)
        weights = torch.from_numpy(np.ascontiguousarray(codes)).view(torch.float8_e4m3fn).float().numpy()
    weights *= scales[:, None]
    return weights.reshape(tuple(shape))


def _are_halves(scales: _Array) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(scales, scales.astype(np.float16).astype(np.float32))


def _unpaired(codes: _Array) -> _Array:
    """Return nibbles [blocks, n] as bytes [blocks, 2 n]."""
    return np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
