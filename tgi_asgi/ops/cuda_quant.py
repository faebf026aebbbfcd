"""Quantised weights as the CUDA kernels read them: codes by rows, scales in a separate array.

They are made once, at load, from the files' blocks, whose 18 to 210 bytes fit no vector load. Nothing is
rounded again: every weight equals the result of `sources.decode`, or of `in_order` (act-order without a
kernel). Only routed experts in float16 treat scales of MXFP4 above 2^16 as 2^16: they overflow anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.formats import FORMATS
from tgi_asgi.ops.norm_weight import HeadNorms
from tgi_asgi.ops.qkv_heads import QkvHeads
from tgi_asgi.ops.sources import WeightSource
from tgi_asgi.ops.tensors import plain_tensor

_kernels: Any = torch.ops.tgi_cuda
SCALE_ROWS = 16  # the number of rows of scales is a multiple of it
PIECE_BYTES = 8 << 20  # of a matrix, moved to the device at a time
# Values of E2M1 codes, doubled, so that they are integers, and plus 12, so that none is negative.
_E2M1 = torch.tensor([12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0], dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A matrix on the device and its bias: `made` of `LinearWeight` and the other weights on CUDA."""

    matrix: Tensor | CudaQuantMatrix  # [rows, columns]
    bias: Tensor | None  # [rows] float32


@dataclass(frozen=True, slots=True)
class DeviceExperts:
    """The experts of a layer, stacked by rows: `made` of `ExpertsWeight` on CUDA. Biases: [experts, rows]."""

    gate_up: DeviceMatrix  # each expert's gate, then its up
    down: DeviceMatrix


@dataclass(frozen=True, slots=True)
class Repacking:
    """How a CUDA device computes products, an `Arithmetic`: from the file's own codes if it has them.

    Otherwise weights are converted to `dtype`. Matrices are built on `device` in pieces, so the host holds
    only a small part of one at a time.
    """

    dtype: torch.dtype
    device: torch.device = field(default=torch.device("cpu"), repr=False)  # does not affect the output's bits

    def linear(self, source: WeightSource, bias: Floats | None, *, is_vocabulary: bool) -> DeviceMatrix:
        """Make a matrix; see `Arithmetic.linear`."""
        return DeviceMatrix(self._stack([source]), _joined_biases([bias], self.device))

    def qkv(
        self,
        sources: Sequence[WeightSource],
        biases: Sequence[Floats] | None,
        heads: QkvHeads,
        norms: HeadNorms | None,
    ) -> DeviceMatrix:
        """Stack q, k and v; see `Arithmetic.qkv`. Rows rotated together are placed rotary_dim / 2 apart."""
        if heads.is_interleaved:
            orders = [joined_halves(heads, heads.num_heads), joined_halves(heads, heads.num_kv_heads)]
            sources = [
                *(part.in_rows(order) for part, order in zip(sources, orders, strict=False)),
                sources[2],
            ]
            if biases is not None:
                biases = [*(part[order] for part, order in zip(biases, orders, strict=False)), biases[2]]
        return DeviceMatrix(self._stack(sources), _joined_biases(biases, self.device))

    def gate_up(self, sources: Sequence[WeightSource], biases: Sequence[Floats] | None) -> DeviceMatrix:
        """Stack gate and up; see `Arithmetic.gate_up`."""
        return DeviceMatrix(self._stack(sources), _joined_biases(biases, self.device))

    def router(self, source: WeightSource, bias: Floats | None) -> DeviceMatrix:
        """Make a router's matrix, without codes; see `Arithmetic.router`."""
        return DeviceMatrix(self._plain([source]), _joined_biases([bias], self.device))

    def heads(self, source: WeightSource, num_heads: int, *, is_transposed: bool) -> DeviceMatrix:
        """Refuse per-head products, which have no CUDA kernels."""
        raise ValueError("latent attention is computed on CPUs only, not on CUDA")

    def for_states(self) -> Repacking:
        """Return how matrices are repacked whose inputs are not rounded: as all others."""
        return self

    def for_experts(self) -> Repacking:
        """Return the same arithmetic: `joined` decodes what it cannot stack."""
        return self

    def experts(self, gate_ups: Sequence[DeviceMatrix], downs: Sequence[DeviceMatrix]) -> DeviceExperts:
        """Stack the experts' matrices; see `Arithmetic.experts`.

        Until the caller drops the parts, the layer's experts are on the device twice.
        """
        return DeviceExperts(self._join(gate_ups), self._join(downs))

    def _join(self, parts: Sequence[DeviceMatrix]) -> DeviceMatrix:
        biases = [part.bias for part in parts if part.bias is not None]
        return DeviceMatrix(
            joined([part.matrix for part in parts], self.dtype), torch.stack(biases) if biases else None
        )

    def _stack(self, sources: Sequence[WeightSource]) -> Tensor | CudaQuantMatrix:
        return repack(sources, self.device) if can_repack(sources) else self._plain(sources)

    def _plain(self, sources: Sequence[WeightSource]) -> Tensor:
        """Stack sources by rows, decoded, with their columns in order."""
        sources = [source.in_order() for source in sources]
        rows = [source.shape[0] for source in sources]
        matrix = torch.empty(sum(rows), sources[0].shape[1], dtype=self.dtype, device=self.device)
        for part, source in zip(torch.split(matrix, rows), sources, strict=True):
            _write(part, source)
        return matrix


def _joined_biases(biases: Sequence[Floats | None] | None, device: torch.device) -> Tensor | None:
    found = [bias for bias in biases or () if bias is not None]
    return torch.from_numpy(np.concatenate(found)).to(device) if found else None


def joined_halves(heads: QkvHeads, num_heads: int) -> npt.NDArray[np.int64]:
    """Return the rows of `num_heads` heads with the pairs rotated together at i and i + rotary_dim / 2.

    They are at 2i and 2i + 1 before.
    """
    pairs = np.arange(heads.rotary_dim).reshape(-1, 2)
    one = np.concatenate([pairs.T.reshape(-1), np.arange(heads.rotary_dim, heads.head_dim)])
    starts = np.arange(num_heads, dtype=np.int64)[:, None] * heads.head_dim
    rows: npt.NDArray[np.int64] = (starts + one).reshape(-1)
    return rows


def _write(matrix: Tensor, source: WeightSource) -> None:
    """Write a source's weights to a matrix of any dtype and device, rounded once.

    They are copied to the device as stored and rounded there: rounding on the host would need as much memory
    again.
    """
    weights = plain_tensor(source)
    num_rows = max(PIECE_BYTES // (weights.shape[1] * weights.itemsize), 1)
    for target, piece in zip(torch.split(matrix, num_rows), torch.split(weights, num_rows), strict=True):
        target.copy_(piece.to(matrix.device))


@dataclass(frozen=True, slots=True)
class CudaQuantMatrix:
    """A matrix with weights scale * (code - zero) + offset, one scale and offset per group of columns.

    Codes are integers, or floats without zero point and offsets: E4M3 if they are float8_e4m3fn, E2M1 if
    scales are uint8. Such a scale is 2^(byte - 127), E8M0. Kernels read a group's scales for 16 rows at once,
    so their rows are padded with zeros to a multiple of 16.

    Codes of 8 bits are in column order. Eight of 4 bits are a 32-bit word whose nibbles, from the lowest on,
    are those of columns 0 2 4 6 1 3 5 7: a shift and a mask make a pair of neighbours, 16 bits apart.
    """

    codes: Tensor  # [rows, columns * bits / 8] uint8, or float8_e4m3fn
    scales: Tensor  # [columns / group, padded rows] float16, or float32 if float16 would round, or uint8
    offsets: Tensor | None  # the same shape and dtype
    shape: tuple[int, int]  # rows, columns
    bits: int  # 4 or 8
    zero: int
    order: Tensor | None = None  # [columns] int64: matrix column of each column of codes

    @property
    def kind(self) -> tuple[object, ...]:
        """What matrices must have in common to be rows of one."""
        layout = (self.codes.dtype, self.scales.dtype, self.offsets is None, self.scales.shape[0])
        return (*layout, self.shape[1], self.bits, self.zero)

    @property
    def is_float4(self) -> bool:
        """Whether codes are E2M1 and scales E8M0."""
        return self.scales.dtype is torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it occupies."""
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

    def sliced(self, first: int, last: int) -> CudaQuantMatrix:
        """Return rows [first, last); they share the matrix's codes unless these would not be aligned."""
        codes = self.codes[first:last]
        is_aligned = first * self.codes.shape[1] % 16 == 0
        return self._with_rows(codes if is_aligned else codes.clone(), slice(first, last))

    def picked(self, rows: Tensor) -> CudaQuantMatrix:
        """Return a copy of some rows, int64 [n] on the matrix's device."""
        codes = self.codes.view(torch.uint8)[rows].view(self.codes.dtype)  # torch cannot index 8-bit floats
        return self._with_rows(codes, rows)

    def _with_rows(self, codes: Tensor, rows: slice | Tensor) -> CudaQuantMatrix:
        return replace(
            self, codes=codes, scales=_cat_rows([self.scales[:, rows]]),
            offsets=None if self.offsets is None else _cat_rows([self.offsets[:, rows]]),
            shape=(codes.shape[0], self.shape[1]),
        )  # fmt: skip

    def decode(self, out: Tensor) -> None:
        """Write the matrix to out [rows, columns], bfloat16 or float16, its columns in the codes' order."""
        _kernels.dequantise(self.codes, self.scales, self.offsets, self.bits, self.zero, out)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix itself [rows, columns], bfloat16 or float16."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        self.decode(out)
        return out if self.order is None else torch.empty_like(out).index_copy_(1, self.order, out)


def can_repack(sources: Sequence[WeightSource]) -> bool:
    """Return whether sources can form one matrix: all quantised, FP8 only with FP8, in one column order."""
    rows = [FORMATS[source.format] for source in sources]
    is_one = len({row.name for row in rows}) == 1 or not any(row.is_float8 for row in rows)
    orders = {None if source.order is None else source.order.tobytes() for source in sources}
    return is_one and len(orders) == 1 and all(row.is_quantised for row in rows)


def repack(sources: Sequence[WeightSource], device: torch.device | None = None) -> CudaQuantMatrix:
    """Stack sources by rows; if their formats differ (v of Q4_K_M files), as 8-bit codes with offsets.

    They are stacked on the device. A piece needs several times its bytes on the host while it is converted.
    """
    target = device or torch.device("cpu")
    parts = [_repack_one(piece).to(target) for source in sources for piece in _pieces(source)]
    if len({source.format for source in sources}) > 1:
        group = min(part.shape[1] // part.scales.shape[0] for part in parts)
        parts = [_widened(part, group) for part in parts]
    order = None if sources[0].order is None else torch.from_numpy(sources[0].order).to(target)
    return _cat(parts, order)


def joined(matrices: Sequence[Tensor | CudaQuantMatrix], dtype: torch.dtype) -> Tensor | CudaQuantMatrix:
    """Stack matrices of equal shapes by rows: as codes if all have codes of one kind, else decoded.

    Codes whose columns have an order of their own (GPTQ's act-order) are decoded, too.
    """
    coded = [matrix for matrix in matrices if isinstance(matrix, CudaQuantMatrix) and matrix.order is None]
    if len(coded) < len(matrices) or len({matrix.kind for matrix in coded}) > 1:
        return torch.cat([
            matrix.plain(dtype) if isinstance(matrix, CudaQuantMatrix) else matrix for matrix in matrices
        ])  # fmt: skip
    return _cat(coded)


def _cat(parts: Sequence[CudaQuantMatrix], order: Tensor | None = None) -> CudaQuantMatrix:
    """Stack matrices of one kind by rows; `order` is that of the result's columns."""
    first = parts[0]
    return CudaQuantMatrix(
        torch.cat([part.codes.view(torch.uint8) for part in parts]).view(first.codes.dtype),
        _cat_rows([part.scales[:, : part.shape[0]] for part in parts]),
        None
        if first.offsets is None
        else _cat_rows([cast(Tensor, part.offsets)[:, : part.shape[0]] for part in parts]),
        (sum(part.shape[0] for part in parts), first.shape[1]),
        first.bits,
        first.zero,
        order,
    )


def _cat_rows(planes: Sequence[Tensor]) -> Tensor:
    """Join scales or offsets [groups, rows] and pad their rows."""
    num_rows = sum(plane.shape[1] for plane in planes)
    padding = planes[0].new_zeros(planes[0].shape[0], -num_rows % SCALE_ROWS)
    return torch.cat([*planes, padding], 1)


def _pieces(source: WeightSource) -> Iterator[WeightSource]:
    """Split a matrix by rows into pieces of about `PIECE_BYTES`."""
    rows, columns = source.shape
    data = source.data.reshape(rows, -1)
    step = max(PIECE_BYTES // data.shape[1], 1)
    for first in range(0, rows, step):
        piece = data[first : first + step]
        yield type(source)(piece.reshape(-1), source.format, (len(piece), columns))


def _repack_one(source: WeightSource) -> CudaQuantMatrix:
    """Convert a piece, without padding."""
    row = FORMATS[source.format]
    found = _C.repack_rows(source.data.reshape(-1), source.format, source.shape[1])
    codes, scales, offsets = (None if part is None else torch.from_numpy(part) for part in found)
    assert codes is not None and scales is not None
    dtype = torch.uint8 if row.is_float4 else torch.float16 if row.has_half_scales else torch.float32
    return CudaQuantMatrix(
        codes.view(torch.float8_e4m3fn) if row.is_float8 else codes,
        scales.T.to(dtype).contiguous(),
        None if offsets is None else offsets.T.to(dtype).contiguous(),
        (source.shape[0], source.shape[1]),
        row.repacked_bits,
        row.repacked_zero,
    )


def _widened(matrix: CudaQuantMatrix, group: int) -> CudaQuantMatrix:
    """Convert a matrix to 8-bit codes without zero point, with float32 scales and offsets of this group.

    Neither has padding. This is exact: scales have at most 18 bits of mantissa, codes at most eight, and a
    zero point is a power of two.
    """
    codes = _by_column(matrix)
    if matrix.is_float4:
        codes = _E2M1.to(codes.device)[codes.int()]
        exponents = matrix.scales.int()  # scales of doubled values are 2^(exponent - 128), also if denormal
        bits = torch.where(exponents < 2, exponents + 1 << 21, exponents - 1 << 23)
        scales = bits.view(torch.float32)
        offsets = -12 * scales
    else:
        scales = matrix.scales.float()
        offsets = -matrix.zero * scales if matrix.offsets is None else matrix.offsets.float()
    repeats = matrix.shape[1] // scales.shape[0] // group
    scales, offsets = (plane.repeat_interleave(repeats, dim=0) for plane in (scales, offsets))
    return CudaQuantMatrix(codes, scales, offsets, matrix.shape, 8, 0)


def _by_column(matrix: CudaQuantMatrix) -> Tensor:
    """Return integer or E2M1 codes one by one, in column order: [rows, columns] uint8."""
    if matrix.bits == 8:
        return matrix.codes
    nibbles = torch.stack([matrix.codes & 15, matrix.codes >> 4], dim=-1)
    return nibbles.view(-1, 2, 4).transpose(1, 2).reshape(matrix.shape)
