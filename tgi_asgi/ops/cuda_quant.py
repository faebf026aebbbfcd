"""Quantised weights as the CUDA kernels read them: codes in the order of columns, scales beside them.

Made once, at load, from the files' blocks: these are of 18 to 210 bytes, which no vector load fits. Nothing
is rounded again: every weight equals what `formats.quants` decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops.formats import BLOCKS
from tgi_asgi.ops.grouped import GROUPED, read_float8, read_int4
from tgi_asgi.ops.sources import WeightSource, plain_tensor
from tgi_asgi.ops.weights import QkvWeight

_kernels: Any = torch.ops.tgi_cuda
_Array = npt.NDArray[Any]
_BLOCKS = BLOCKS | GROUPED
_FLOATS = frozenset(name for name in GROUPED if name.startswith("F8"))
PIECE_BYTES = 8 << 20  # of a matrix on its way to the device


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A matrix on the device and its bias: what `LinearWeight.made` and the others are there."""

    matrix: Tensor | CudaQuantMatrix  # [rows, columns]
    bias: Tensor | None  # [rows] float32


@dataclass(frozen=True, slots=True)
class Repacking:
    """How products compute on a CUDA device, an `Arithmetic`: from the file's own codes where it has them.

    Else in `dtype`. Matrices are made on `device`, in pieces: little of one is ever the host's.
    """

    dtype: torch.dtype
    device: torch.device = field(default=torch.device("cpu"), repr=False)  # no bit of the output hangs on it

    def linear(self, source: WeightSource, bias: Tensor | None, *, is_vocabulary: bool) -> DeviceMatrix:
        """Make a matrix, as `Arithmetic.linear` says."""
        return DeviceMatrix(self._stack([source]), bias)

    def qkv(
        self, sources: Sequence[WeightSource], biases: Sequence[Tensor] | None, shape: QkvWeight
    ) -> DeviceMatrix:
        """Stack q, k and v, as `Arithmetic.qkv` says."""
        return DeviceMatrix(self._stack(sources), None if biases is None else torch.cat(list(biases)))

    def gate_up(self, sources: Sequence[WeightSource], biases: Sequence[Tensor] | None) -> DeviceMatrix:
        """Stack gate and up, as `Arithmetic.gate_up` says."""
        return DeviceMatrix(self._stack(sources), None if biases is None else torch.cat(list(biases)))

    def _stack(self, sources: Sequence[WeightSource]) -> Tensor | CudaQuantMatrix:
        if can_repack(sources):
            return repack(sources, self.device)
        sources = [source.in_order() for source in sources]
        rows = [source.shape[0] for source in sources]
        matrix = torch.empty(sum(rows), sources[0].shape[1], dtype=self.dtype, device=self.device)
        for part, source in zip(torch.split(matrix, rows), sources, strict=True):
            _write(part, source)
        return matrix


def _write(matrix: Tensor, source: WeightSource) -> None:
    """Write a source's weights to a matrix of any dtype and device, rounded once.

    They cross to a device as the file has them, and are rounded there: rounding here would take as much
    memory again.
    """
    weights = plain_tensor(source)
    num_rows = max(PIECE_BYTES // (weights.shape[1] * weights.itemsize), 1)
    for target, piece in zip(torch.split(matrix, num_rows), torch.split(weights, num_rows), strict=True):
        target.copy_(piece.to(matrix.device))


@dataclass(frozen=True, slots=True)
class CudaQuantMatrix:
    """A matrix whose weights are scale * (code - zero) + offset, one scale and offset a group of columns."""

    codes: Tensor  # [rows, columns * bits / 8] uint8, or float8_e4m3fn: without zero point and offsets
    scales: Tensor  # [rows, columns / group] float16, or float32 where float16 would round
    offsets: Tensor | None  # the same
    shape: tuple[int, int]  # rows, columns
    bits: int  # 4 or 8
    zero: int
    order: Tensor | None = None  # [columns] int64: which column of the matrix each of the codes' is

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        parts = (self.codes, self.scales, self.offsets, self.order)
        return sum(0 if part is None else part.nbytes for part in parts)

    def to(self, device: torch.device) -> CudaQuantMatrix:
        """Copy to a device."""
        return CudaQuantMatrix(
            self.codes.to(device),
            self.scales.to(device),
            None if self.offsets is None else self.offsets.to(device),
            self.shape,
            self.bits,
            self.zero,
            None if self.order is None else self.order.to(device),
        )

    def gather(self, a: Tensor) -> Tensor:
        """Return the columns of a [n_tokens, columns] in the order of the codes'."""
        return a if self.order is None else a.index_select(1, self.order)

    def multiply(self, a: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write a @ W.T (+ bias) to out [n_tokens, rows], of a's dtype or float32, from the codes.

        They are read again for every eight tokens of a [n_tokens, columns]. `bias` is float32. A token's
        result does not depend on the others.
        """
        _kernels.quant_linear(
            self.gather(a), self.codes, self.scales, self.offsets, bias, self.bits, self.zero, out
        )

    def decode(self, out: Tensor) -> None:
        """Write the matrix to out [rows, columns], bfloat16 or float16, its columns as the codes lie."""
        _kernels.dequantise(self.codes, self.scales, self.offsets, self.bits, self.zero, out)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix itself [rows, columns], bfloat16 or float16."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        self.decode(out)
        return out if self.order is None else torch.empty_like(out).index_copy_(1, self.order, out)


def can_repack(sources: Sequence[WeightSource]) -> bool:
    """Tell whether sources become one matrix: of formats known here, floats of one, columns in one order."""
    formats = {source.format for source in sources}
    is_one = len(formats) == 1 or not _FLOATS.intersection(formats)
    orders = {None if source.order is None else source.order.tobytes() for source in sources}
    return is_one and len(orders) == 1 and all(name in _REPACKERS for name in formats)


def repack(sources: Sequence[WeightSource], device: torch.device | None = None) -> CudaQuantMatrix:
    """Stack sources by rows; where their formats differ (v of Q4_K_M files), as eight bits with offsets.

    They are stacked on the device; on the way there a piece takes several times its bytes of the host.
    """
    target = device or torch.device("cpu")
    parts = [_repack_one(piece).to(target) for source in sources for piece in _pieces(source)]
    if len({source.format for source in sources}) > 1:
        group = min(part.shape[1] // part.scales.shape[1] for part in parts)
        parts = [_widened(part, group) for part in parts]
    first = parts[0]
    return CudaQuantMatrix(
        torch.cat([part.codes.view(torch.uint8) for part in parts]).view(first.codes.dtype),
        torch.cat([part.scales for part in parts]),
        None if first.offsets is None else torch.cat([cast(Tensor, part.offsets) for part in parts]),
        (sum(part.shape[0] for part in parts), first.shape[1]),
        first.bits,
        first.zero,
        None if sources[0].order is None else torch.from_numpy(sources[0].order).to(target),
    )


def _pieces(source: WeightSource) -> Iterator[WeightSource]:
    """Cut a matrix into rows of about `PIECE_BYTES`."""
    rows, columns = source.shape
    data = source.data.reshape(rows, -1)
    step = max(PIECE_BYTES // data.shape[1], 1)
    for first in range(0, rows, step):
        piece = data[first : first + step]
        yield type(source)(piece.reshape(-1), source.format, (len(piece), columns))


def _repack_one(source: WeightSource) -> CudaQuantMatrix:
    codes, scales, offsets = _REPACKERS[source.format](source.data.reshape(-1, _BLOCKS[source.format][1]))
    rows, columns = source.shape

    def by_row(plane: _Array) -> Tensor:
        return torch.from_numpy(plane.reshape(rows, -1))

    bits, zero = _KINDS[source.format]
    return CudaQuantMatrix(
        by_row(codes).view(torch.float8_e4m3fn) if source.format in _FLOATS else by_row(codes),
        by_row(scales),
        None if offsets is None else by_row(offsets),
        (rows, columns),
        bits,
        zero,
    )


def _widened(matrix: CudaQuantMatrix, group: int) -> CudaQuantMatrix:
    """Write a matrix with codes of eight bits, no zero point, float32 scales and offsets of this group.

    Exact: scales have at most 18 bits of mantissa, codes at most eight, and a zero point is a power of two.
    """
    rows, columns = matrix.shape
    codes = matrix.codes
    if matrix.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(rows, columns)
    scales = matrix.scales.float()
    offsets = -matrix.zero * scales if matrix.offsets is None else matrix.offsets.float()
    repeats = columns // scales.shape[1] // group
    scales, offsets = (plane.repeat_interleave(repeats, dim=1) for plane in (scales, offsets))
    return CudaQuantMatrix(codes, scales, offsets, matrix.shape, 8, 0)


_Planes = tuple[_Array, _Array, _Array | None]  # codes, scales, offsets, block after block
_KINDS = {  # bits of a code, and the zero point
    "Q8_0": (8, 128), "Q4_0": (4, 8), "Q4_1": (4, 0), "Q5_0": (8, 16), "Q5_1": (8, 0), "Q4_K": (4, 0),
    "Q5_K": (8, 0), "Q6_K": (8, 32), **{name: (4 if "INT4" in name else 8, 0) for name in GROUPED},
}  # fmt: skip


def _q8_0(blocks: _Array) -> _Planes:
    return blocks[:, 2:] ^ 0x80, _halves(blocks[:, :2]), None  # signed codes plus 128


def _q4_0(blocks: _Array) -> _Planes:
    return _nibbles(blocks[:, 2:]), _halves(blocks[:, :2]), None


def _q4_1(blocks: _Array) -> _Planes:
    return _nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks: _Array) -> _Planes:
    return _fives(blocks[:, 6:], blocks[:, 2:6]), _halves(blocks[:, :2]), None


def _q5_1(blocks: _Array) -> _Planes:
    return _fives(blocks[:, 8:], blocks[:, 4:8]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q4_k(blocks: _Array) -> _Planes:
    """A block of 256: scales and minima, nibbles by 64."""
    scales, minima = _k_scales(blocks)
    return _pairs(_k_nibbles(blocks[:, 16:]).reshape(-1, 256)), scales, -minima


def _q5_k(blocks: _Array) -> _Planes:
    """The same, with the fifth bit of column i of each 32 in byte i, the first 32 columns' lowest."""
    scales, minima = _k_scales(blocks)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _k_nibbles(blocks[:, 48:]).reshape(-1, 8, 32) | fifth << 4
    return codes.reshape(-1, 256), scales, -minima


def _k_scales(blocks: _Array) -> tuple[_Array, _Array]:
    """Two float16 factors, eight scales and minima of 6 bits; return the products, [blocks, 8] float32."""
    scale, least = (_halves(blocks[:, i : i + 2]).astype(np.float32) for i in (0, 2))
    packed = blocks[:, 4:16]
    low, high = packed[:, :8] & 63, packed[:, 8:]
    scales = np.concatenate([low[:, :4], high & 15 | (packed[:, :4] >> 6) << 4], axis=1)
    minima = np.concatenate([low[:, 4:], high >> 4 | (packed[:, 4:8] >> 6) << 4], axis=1)
    return scale * scales, least * minima


def _k_nibbles(data: _Array) -> _Array:
    """32 bytes have the nibbles of 64 columns: first the low ones, then the high."""
    nibbles = data.reshape(-1, 4, 32)
    codes: _Array = np.stack([nibbles & 15, nibbles >> 4], axis=2)
    return codes


def _q6_k(blocks: _Array) -> _Planes:
    """A block of 256: low nibbles, high pairs of bits, sixteen int8 scales, a float16 scale."""
    low = blocks[:, :128].reshape(-1, 2, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    nibbles = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scale = _halves(np.ascontiguousarray(blocks[:, 208:210])).astype(np.float32)
    return (nibbles | high << 4).reshape(-1, 256), scale * scales, None


def _int4(blocks: _Array) -> _Planes:
    codes, scales, zeros = read_int4(blocks)
    return codes, scales, -zeros.astype(np.float32) * scales  # exact: 11 bits times five


def _float8(blocks: _Array) -> _Planes:
    codes, scales = read_float8(blocks)
    return np.ascontiguousarray(codes), scales, None


_REPACKERS: dict[str, Callable[[_Array], _Planes]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k, **{name: _float8 if name in _FLOATS else _int4 for name in GROUPED},
}  # fmt: skip


def _halves(data: _Array) -> _Array:
    """Read pairs of bytes as float16."""
    halves: _Array = np.ascontiguousarray(data).view(np.float16)
    return halves


def _nibbles(data: _Array) -> _Array:
    """Put a block's nibbles, of columns i and i + 16 a byte, in the order of columns."""
    return _pairs(np.concatenate([data & 15, data >> 4], axis=1))


def _fives(nibbles: _Array, bits: _Array) -> _Array:
    """Join a block's nibbles, as `_nibbles` has them, and 32 bits, the first column's lowest."""
    fifth: _Array = np.unpackbits(np.ascontiguousarray(bits), axis=1, bitorder="little")
    codes: _Array = np.concatenate([nibbles & 15, nibbles >> 4], axis=1) | fifth << 4
    return codes


def _pairs(codes: _Array) -> _Array:
    """Pack codes of 4 bits, the first of two in the low half."""
    packed: _Array = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed
