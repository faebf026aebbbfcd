"""Undo the packing of integer codes in quantised safetensors.

AutoAWQ, AutoGPTQ and compressed-tensors each have their own layout of integers. Here they become rows of
codes in the order of columns, low half first, with a scale and a zero point for each group of columns. Used
by `models/loading`; knows neither torch nor files.
Sources: AutoAWQ's packing_utils.py, AutoGPTQ's qlinear_cuda.py, GPTQModel's model.py, compressed-tensors'
pack_quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.errors import check

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# The nibble of each of eight rows in AutoAWQ's words, the lowest first: the inverse of `kAwqRows`.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# Widths of GPTQ's codes. GPTQModel also writes 5 to 7, in a layout of its own (planes of bits).
GPTQ_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """A matrix with the weights scales[row, group] * (code - zeros[row, group])."""

    codes: Bytes  # [rows, columns * bits / 8], the first of two nibbles in the low half
    scales: Floats  # [rows, num_groups]
    zeros: Bytes  # [rows, num_groups]
    bits: int  # 4 or 8
    groups: npt.NDArray[np.int64] | None = None  # [columns]; None: consecutive groups of equal size

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def by_group(self) -> tuple[IntegerMatrix, npt.NDArray[np.int64]] | None:
        """Reorder columns so that each group is contiguous; also return the original index of each column.

        This undoes AutoGPTQ's act-order: a product reads its input's columns in this order. Returns None if
        the groups differ in size.
        """
        assert self.groups is not None
        _, columns = self.shape
        counts = np.bincount(self.groups, minlength=self.scales.shape[1])
        if (counts * len(counts) != columns).any():
            return None
        order = np.argsort(self.groups, kind="stable")
        codes = self.codes[:, order] if self.bits == 8 else _C.reordered_nibbles(self.codes, order)
        return IntegerMatrix(codes, self.scales, self.zeros, self.bits), order

    def dequantise(self) -> Floats:
        """Return the weights [rows, columns], each rounded once."""
        groups, (_, columns) = self.groups, self.shape
        if groups is None:
            groups = np.arange(columns) // (columns // self.scales.shape[1])
        codes, zeros = np.ascontiguousarray(self.codes), np.ascontiguousarray(self.zeros)
        return _C.dequantise(codes, self.bits, np.ascontiguousarray(self.scales), zeros, groups)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the tensors of integer codes do not show by themselves.

    Attributes:
        shift: GPTQ: amount subtracted from stored zero points.
        has_borrow: GPTQ: whether it was subtracted from whole words, as by GPTQModel, so that a zero point of
            0 borrows from the next one.
        group: Columns per group; the last group may have fewer. None: groups of equal size.
        bits: compressed-tensors: width of all codes; None: each matrix shows its own.
    """

    shift: int = 0
    has_borrow: bool = False
    group: int | None = None
    bits: int | None = None

    def groups(self, columns: int, num_groups: int) -> npt.NDArray[np.int64] | None:
        """Return the group of each column; None if all groups have the same size."""
        size = self.group
        if size and size < columns and columns % size and -(-columns // size) == num_groups:
            return np.arange(columns) // size
        check(columns % num_groups == 0, f"{columns} columns cannot be {num_groups} equal groups")
        return None


def unpack_gptq(
    qweight: Words, qzeros: Words, scales: Floats, g_idx: Words | None, columns: int, layout: Layout
) -> IntegerMatrix:
    """Undo AutoGPTQ's packing of codes along the columns, and of zero points along the rows.

    Args:
        qweight: [columns * bits / 32, rows].
        qzeros: [num_groups, rows * bits / 32], stored minus `layout.shift`.
        scales: [num_groups, rows].
        g_idx: [columns], the group of each column, or None.
    """
    check_matrices(qweight=qweight, qzeros=qzeros, scales=scales)
    rows, num_groups = qweight.shape[1], scales.shape[0]
    bits = width(qweight.shape[0], columns)
    check(
        bits in GPTQ_BITS,
        f"qweight has {qweight.shape[0]} words for {columns} columns; supported are codes of "
        f"{', '.join(map(str, GPTQ_BITS))} bits",
    )
    check(
        scales.shape == (num_groups, rows) and qzeros.shape == (num_groups, -(-rows * bits // 32)),
        f"qweight, qzeros and scales do not fit: {qweight.shape}, {qzeros.shape} and {scales.shape}",
    )
    zeros = _gptq_zeros(np.ascontiguousarray(qzeros), bits, layout)[:, :rows]
    return _matrix(
        _C.transposed_words(qweight), scales.T, np.ascontiguousarray(zeros.T), bits, columns,
        _read_groups(g_idx, columns, num_groups, layout),
    )  # fmt: skip


def unpack_awq(qweight: Words, qzeros: Words, scales: Floats, layout: Layout) -> IntegerMatrix:
    """Undo AutoAWQ's packing (GEMM) of eight rows per word, in its own order.

    Args:
        qweight: [columns, rows / 8].
        qzeros: [num_groups, rows / 8].
        scales: [num_groups, rows].
    """
    check_matrices(qweight=qweight, qzeros=qzeros, scales=scales)
    rows, num_groups = qweight.shape[1] * 8, scales.shape[0]
    check(
        scales.shape == (num_groups, rows)
        and qzeros.shape == (num_groups, rows // 8)
        and qweight.shape[0] % 2 == 0,
        f"qweight, qzeros and scales do not fit: {qweight.shape}, {qzeros.shape} and {scales.shape}",
    )
    zeros = _C.unpacked_stream(qzeros, 4).reshape(-1, 8)[:, _AWQ_PLACES].reshape(num_groups, rows)
    return IntegerMatrix(
        _C.awq_codes(qweight), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), 4,
        layout.groups(qweight.shape[0], num_groups),
    )  # fmt: skip


def unpack_compressed(
    packed: Words, scales: Floats, zeros: Words | None, g_idx: Words | None, columns: int, layout: Layout
) -> IntegerMatrix:
    """Undo compressed-tensors' packing; codes are stored offset by half their range.

    Args:
        packed: [rows, columns * bits / 32], or as `compressed_packing` says.
        scales: [rows, num_groups].
        zeros: [rows * bits / 32, num_groups], packed alike; None: half the range.
        g_idx: [columns], the group of each column, or None; all -1 if there is no reordering.
    """
    check_matrices(weight_packed=packed)
    scales = as_rows(scales, packed.shape[0])
    check_matrices(weight_scale=scales)
    rows, num_groups = packed.shape[0], scales.shape[1]
    bits, is_dense = compressed_packing(packed.shape[1], columns, layout)
    check(
        2 <= bits <= 8 and scales.shape[0] == rows,
        f"weight_packed and weight_scale do not fit {columns} columns: {packed.shape} and {scales.shape}",
    )
    if zeros is None:
        points = np.full(scales.shape, 1 << bits - 1, np.uint8)
    else:
        check_matrices(weight_zero_point=zeros)
        points = _unpack(np.ascontiguousarray(zeros.T), bits, is_dense)[:, :rows].T.copy()
        check(points.shape == scales.shape, f"weight_zero_point does not fit: {zeros.shape}")
    return _matrix(
        np.ascontiguousarray(packed), scales, points, bits, columns,
        _read_groups(g_idx, columns, num_groups, layout), is_dense,
    )  # fmt: skip


def unpack_bytes(
    codes: npt.NDArray[np.int8], scales: Floats, zeros: npt.NDArray[np.int8] | None, g_idx: Words | None,
    layout: Layout,
) -> IntegerMatrix:  # fmt: skip
    """Wrap codes of one byte each, [rows, columns], with one scale for all, per row, or per group.

    Args:
        scales: One value, [rows] or [rows, num_groups].
        zeros: int8 of the same shape, or None.
        g_idx: As in `unpack_compressed`.
    """
    check_matrices(weight=codes)
    rows, columns = codes.shape
    scales = as_rows(scales, rows)
    check_matrices(scales=scales)
    check(scales.shape[0] == rows, f"scales {scales.shape} do not fit {codes.shape}")
    groups = _read_groups(g_idx, columns, scales.shape[1], layout)
    points = np.full(scales.shape, 128, np.uint8)
    if zeros is not None:
        offsets = as_rows(zeros, rows)
        check(offsets.shape == scales.shape, f"zero points {offsets.shape} do not fit {scales.shape}")
        points = offsets.view(np.uint8) ^ np.uint8(128)
    return IntegerMatrix(codes.view(np.uint8) ^ np.uint8(128), scales, points, 8, groups)


def width(num_words: int, columns: int) -> int:
    """Return the bits of each of `columns` codes that fill this many words; 0 if there is no such width."""
    bits = num_words * 32 // max(columns, 1)
    return bits if -(-columns * bits // 32) == num_words else 0


def compressed_packing(num_words: int, columns: int, layout: Layout) -> tuple[int, bool]:
    """Return the bits of each of a row's codes, 0 if none fit, and whether the codes are packed without gaps.

    Until its version 0.17, compressed-tensors put 32 // bits codes into each word. Of 3, 5, 6 and 7 bits,
    that leaves some at the top unused.
    """
    widths = range(2, 9) if layout.bits is None else (layout.bits,)
    dense = next((bits for bits in widths if -(-columns * bits // 32) == num_words), None)
    if dense is not None:
        return dense, True
    return next((bits for bits in widths if -(-columns // (32 // bits)) == num_words), 0), False


def _unpack(words: Words, bits: int, is_dense: bool) -> Bytes:
    if is_dense:
        return _C.unpacked_stream(words, bits)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = words.view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(len(words), -1)


def as_rows(values: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """Return scales or zero points per row and group; one value counts for all rows."""
    if values.size == 1:
        return np.full((rows, 1), values.reshape(()), values.dtype)
    return np.ascontiguousarray(values.reshape(rows, 1) if values.shape == (rows,) else values)


def _matrix(
    words: Words,
    scales: Floats,
    zeros: Bytes,
    bits: int,
    columns: int,
    groups: npt.NDArray[np.int64] | None,
    is_dense: bool = True,
) -> IntegerMatrix:
    """Make a matrix of rows of words; codes of other widths get the next wider one, 4 or 8 bits."""
    scales = np.ascontiguousarray(scales)
    if bits in (4, 8) and columns * bits % 32 == 0:
        return IntegerMatrix(words.view(np.uint8), scales, zeros, bits, groups)  # columns ascend
    codes = _unpack(words, bits, is_dense)[:, :columns]
    if bits > 4 or columns % 2:
        offset = np.uint8(128 - (1 << bits - 1))  # a zero point in the middle stays there
        return IntegerMatrix(codes + offset, scales, zeros + offset, 8, groups)
    return IntegerMatrix(codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), scales, zeros, 4, groups)


def _gptq_zeros(words: Words, bits: int, layout: Layout) -> Bytes:
    """Return zero points, one byte each."""
    if layout.has_borrow and layout.shift and 32 % bits == 0:
        ones = sum(layout.shift << at for at in range(0, 32, bits))
        return _C.unpacked_stream((words.view(np.uint32) + np.uint32(ones)).view(np.int32), bits)
    zeros = _C.unpacked_stream(words, bits) + np.uint8(layout.shift)
    return zeros & np.uint8((1 << bits) - 1) if layout.has_borrow else zeros


def _read_groups(
    g_idx: Words | None, columns: int, num_groups: int, layout: Layout
) -> npt.NDArray[np.int64] | None:
    """Check the group of each column; return None if the groups are consecutive and of equal size."""
    if g_idx is None or (g_idx.shape == (columns,) and (g_idx == -1).all()):
        return layout.groups(columns, num_groups)
    check(
        g_idx.shape == (columns,) and int(g_idx.min()) >= 0 and int(g_idx.max()) < num_groups,
        f"g_idx must give one of {num_groups} groups for each of {columns} columns",
    )
    if columns % num_groups == 0 and np.array_equal(g_idx, np.arange(columns) // (columns // num_groups)):
        return None
    return g_idx.astype(np.int64)


def check_matrices(**arrays: npt.NDArray[Any]) -> None:
    """Refuse arrays that are not matrices or are empty, because a file's shapes are untrusted."""
    for name, array in arrays.items():
        check(array.ndim == 2 and array.size > 0, f"{name} has the shape {list(array.shape)}, no matrix's")
