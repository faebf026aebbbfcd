"""Quantised weights as the CUDA kernels read them: codes in the order of columns, scales beside them.

Made once, at load, from the files' blocks: these are of 18 to 210 bytes, which no vector load fits. Nothing
is rounded again: every weight equals what `formats.quants` decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tgi_asgi.ops.weights import WeightSource

_kernels: Any = torch.ops.tgi_cuda
_Array = npt.NDArray[Any]
MAX_TOKENS = 8  # of one call of the kernel
_BLOCK = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q4_K": (256, 144), "Q6_K": (256, 210)}


@dataclass(frozen=True, slots=True)
class Repacking:
    """How products compute on a CUDA device: from the file's own codes where it has them, else in `dtype`."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class CudaQuantMatrix:
    """A matrix whose weights are scale * (code - zero) + offset, one scale and offset a group of columns."""

    codes: Tensor  # [rows, columns * bits / 8] uint8
    scales: Tensor  # [rows, columns / group] float16, or float32 where float16 would round
    offsets: Tensor | None  # the same
    shape: tuple[int, int]  # rows, columns
    bits: int  # 4 or 8
    zero: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def to(self, device: torch.device) -> CudaQuantMatrix:
        """Copy to a device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return CudaQuantMatrix(
            self.codes.to(device), self.scales.to(device), offsets, self.shape, self.bits, self.zero
        )

    def multiply(self, a: Tensor, bias: Tensor | None, out: Tensor, room: Tensor) -> None:
        """Write a @ W.T (+ bias) to out [n_tokens, rows], of a's dtype or float32.

        Few rows of a [n_tokens, columns] are multiplied by the codes, a few at a time; for more, the matrix
        is written to `room` [at least rows * columns] first, once. `bias` is float32.
        """
        if a.shape[0] <= 4 * MAX_TOKENS:
            for first in range(0, a.shape[0], MAX_TOKENS):
                last = first + MAX_TOKENS
                _kernels.quant_linear(
                    a[first:last], self.codes, self.scales, self.offsets, bias, self.bits, self.zero,
                    out[first:last],
                )  # fmt: skip
            return
        plain = room[: self.shape[0] * self.shape[1]].view(self.shape)
        self.decode(plain)
        out.copy_(torch.mm(a, plain.t()))
        if bias is not None:
            out += bias

    def decode(self, out: Tensor) -> None:
        """Write the matrix to out [rows, columns], bfloat16 or float16."""
        _kernels.dequantise(self.codes, self.scales, self.offsets, self.bits, self.zero, out)


def can_repack(formats: Sequence[str], columns: int) -> bool:
    """Tell whether sources of these formats become one matrix: all the same, and one that is known here."""
    return len(set(formats)) == 1 and formats[0] in _BLOCK and columns % _BLOCK[formats[0]][0] == 0


def repack(sources: Sequence[WeightSource]) -> CudaQuantMatrix:
    """Stack sources of one format by rows."""
    name, columns = sources[0].format, sources[0].shape[1]
    parts = [_REPACKERS[name](source.data.reshape(-1, _BLOCK[name][1])) for source in sources]
    rows = sum(source.shape[0] for source in sources)

    def joined(index: int) -> Tensor:
        return torch.from_numpy(np.concatenate([part[index] for part in parts]).reshape(rows, -1))

    offsets = None if parts[0][2] is None else joined(2)
    bits, zero = _KINDS[name]
    return CudaQuantMatrix(joined(0), joined(1), offsets, (rows, columns), bits, zero)


_Planes = tuple[_Array, _Array, _Array | None]  # codes, scales, offsets, block after block
_KINDS = {"Q8_0": (8, 128), "Q4_0": (4, 8), "Q4_1": (4, 0), "Q4_K": (4, 0), "Q6_K": (8, 32)}


def _q8_0(blocks: _Array) -> _Planes:
    return blocks[:, 2:] ^ 0x80, _halves(blocks[:, :2]), None  # signed codes plus 128


def _q4_0(blocks: _Array) -> _Planes:
    return _nibbles(blocks[:, 2:]), _halves(blocks[:, :2]), None


def _q4_1(blocks: _Array) -> _Planes:
    return _nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q4_k(blocks: _Array) -> _Planes:
    """A block of 256: two float16 scales, eight scales and minima of 6 bits, nibbles by 64."""
    scale, least = (_halves(blocks[:, i : i + 2]).astype(np.float32) for i in (0, 2))
    packed = blocks[:, 4:16]
    low, high = packed[:, :8] & 63, packed[:, 8:]
    scales = np.concatenate([low[:, :4], high & 15 | (packed[:, :4] >> 6) << 4], axis=1)
    minima = np.concatenate([low[:, 4:], high >> 4 | (packed[:, 4:8] >> 6) << 4], axis=1)
    nibbles = blocks[:, 16:].reshape(-1, 4, 32)
    codes = np.stack([nibbles & 15, nibbles >> 4], axis=2).reshape(-1, 256)
    return _pairs(codes), scale * scales, -(least * minima)


def _q6_k(blocks: _Array) -> _Planes:
    """A block of 256: low nibbles, high pairs of bits, sixteen int8 scales, a float16 scale."""
    low = blocks[:, :128].reshape(-1, 2, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    nibbles = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scale = _halves(np.ascontiguousarray(blocks[:, 208:210])).astype(np.float32)
    return (nibbles | high << 4).reshape(-1, 256), scale * scales, None


_REPACKERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q6_K": _q6_k}


def _halves(data: _Array) -> _Array:
    """Read pairs of bytes as float16."""
    halves: _Array = np.ascontiguousarray(data).view(np.float16)
    return halves


def _nibbles(data: _Array) -> _Array:
    """Put a block's nibbles, of columns i and i + 16 a byte, in the order of columns."""
    return _pairs(np.concatenate([data & 15, data >> 4], axis=1))


def _pairs(codes: _Array) -> _Array:
    """Pack codes of 4 bits, the first of two in the low half."""
    packed: _Array = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed
