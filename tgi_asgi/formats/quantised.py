"""Quantised safetensors checkpoints: parse `quantization_config`, and undo the packing of codes.

AutoAWQ, AutoGPTQ and compressed-tensors each have their own layout of integers. Here they become rows of
codes in the order of columns, low half first, with a scale and a zero point for each group of columns. FP8
codes are bytes already. Used by `models/loading`; knows neither torch nor files.
Sources: AutoAWQ's packing_utils.py, AutoGPTQ's qlinear_cuda.py, compressed-tensors' pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# Columns of each group of eight in the order of AutoAWQ's nibbles in a word, lowest nibble first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP8_METHODS = ("fp8", "fbgemm_fp8")
_COMPRESSED_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's matrices are quantised; the tensors' names show which matrices are.

    Raises:
        ModelLoadError: if a method, or an option of one, is not supported.
    """

    method: str  # awq, gptq, fp8, mxfp4 or compressed-tensors
    bits: int = 4  # of integers
    zero_shift: int = 0  # GPTQ: amount subtracted from stored zero points
    block: tuple[int, int] | None = None  # FP8: rows and columns per scale; None: a whole row, or all

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Quantisation | None:
        """Read a `config.json`; return None if it has no quantisation."""
        options = config.get("quantization_config")
        if options is None:
            return None
        _check(isinstance(options, dict), "`quantization_config` must be an object")
        method = str(options.get("quant_method", "")).lower()
        if method == "gptq":
            return cls._gptq(options)
        if method == "awq":
            return cls._awq(options)
        if method == "mxfp4":
            return cls("mxfp4")
        if method in _FP8_METHODS:
            return cls("fp8", 8, block=_read_block(options.get("weight_block_size")))
        if method == "modelopt":
            algorithm = options.get("quant_algo")
            _check(algorithm == "FP8", f"ModelOpt of quant_algo {algorithm!r} is not supported, only FP8")
            return cls("fp8", 8)
        _check(
            method == "compressed-tensors",
            f"checkpoints quantised by {method or 'an unnamed method'} are not supported; supported are awq, "
            "gptq, fp8, modelopt, mxfp4 and compressed-tensors: take one of these, the original, or a GGUF "
            "file",
        )
        layout = options.get("format")
        _check(
            layout in _COMPRESSED_FORMATS,
            f"compressed-tensors of format {layout!r} are not supported; supported are "
            f"{', '.join(_COMPRESSED_FORMATS)}",
        )
        weights = _find_weights(options.get("config_groups"))
        bits = 8 if weights.get("num_bits") == 8 else 4
        return cls("compressed-tensors", bits, block=_read_block(weights.get("block_structure")))

    @classmethod
    def _gptq(cls, options: Mapping[str, Any]) -> Quantisation:
        bits, layout = options.get("bits"), options.get("checkpoint_format") or "gptq"
        _check(bits in (4, 8), f"GPTQ of {bits} bits is not supported, only of 4 and 8")
        _check(
            layout in ("gptq", "gptq_v2"), f"GPTQ of checkpoint_format {layout!r} is not supported, only gptq"
        )
        return cls("gptq", 8 if bits == 8 else 4, 1 if layout == "gptq" else 0)

    @classmethod
    def _awq(cls, options: Mapping[str, Any]) -> Quantisation:
        bits, version = options.get("bits", options.get("w_bit", 4)), str(options.get("version", "gemm"))
        _check(bits == 4, f"AWQ of {bits} bits is not supported, only of 4")
        _check(version.lower() == "gemm", f"AWQ of version {version!r} is not supported, only gemm")
        return cls("awq")


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
        codes: Bytes = self._bytes()[:, order]
        if self.bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
        return IntegerMatrix(codes, self.scales, self.zeros, self.bits), order

    def dequantise(self) -> Floats:
        """Return the weights [rows, columns], each rounded once."""
        codes, (_, columns) = self._bytes(), self.shape
        groups = self.groups
        if groups is None:
            groups = np.arange(columns) // (columns // self.scales.shape[1])
        weights = codes.astype(np.float32)
        weights -= self.zeros[:, groups]
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged file may have any scales
            weights *= self.scales[:, groups]
        return weights

    def _bytes(self) -> Bytes:
        """Return the codes [rows, columns], one byte each."""
        codes = self.codes
        if self.bits == 8:
            return codes
        return np.stack([codes & 15, codes >> 4], axis=2).reshape(self.shape)


def unpack_gptq(
    qweight: Words, qzeros: Words, scales: Floats, g_idx: Words | None, bits: int, shift: int
) -> IntegerMatrix:
    """Undo AutoGPTQ's packing of codes along the columns, and of zero points along the rows.

    Args:
        qweight: [columns * bits / 32, rows].
        qzeros: [num_groups, rows * bits / 32], stored minus `shift`.
        scales: [num_groups, rows].
        g_idx: [columns], the group of each column, or None.
    """
    _check_matrices(qweight=qweight, qzeros=qzeros, scales=scales)
    rows, num_groups = qweight.shape[1], scales.shape[0]
    _check(
        scales.shape == (num_groups, rows) and qzeros.shape == (num_groups, rows * bits / 32),
        f"qweight, qzeros and scales do not fit: {qweight.shape}, {qzeros.shape} and {scales.shape}",
    )
    codes = np.ascontiguousarray(qweight.T).view(np.uint8)  # little-endian words: columns ascend
    zeros = _by_byte(np.ascontiguousarray(qzeros), bits)[:, :rows] + np.uint8(shift)
    columns = codes.shape[1] * 8 // bits
    return IntegerMatrix(
        codes,
        np.ascontiguousarray(scales.T),
        np.ascontiguousarray(zeros.T),
        bits,
        _read_groups(g_idx, columns, num_groups),
    )


def unpack_awq(qweight: Words, qzeros: Words, scales: Floats) -> IntegerMatrix:
    """Undo AutoAWQ's packing (GEMM) of eight rows per word, in its own order.

    Args:
        qweight: [columns, rows / 8].
        qzeros: [num_groups, rows / 8].
        scales: [num_groups, rows].
    """
    _check_matrices(qweight=qweight, qzeros=qzeros, scales=scales)
    rows, num_groups = qweight.shape[1] * 8, scales.shape[0]
    _check(
        scales.shape == (num_groups, rows)
        and qzeros.shape == (num_groups, rows // 8)
        and qweight.shape[0] % num_groups == qweight.shape[0] % 2 == 0,
        f"qweight, qzeros and scales do not fit: {qweight.shape}, {qzeros.shape} and {scales.shape}",
    )
    codes = _awq_rows(qweight)  # [columns, rows]
    pairs = codes[0::2] | codes[1::2] << 4
    return IntegerMatrix(
        np.ascontiguousarray(pairs.T),
        np.ascontiguousarray(scales.T),
        np.ascontiguousarray(_awq_rows(qzeros).T),
        4,
    )


def unpack_compressed(
    packed: Words, scales: Floats, zeros: Words | None, g_idx: Words | None, columns: int
) -> IntegerMatrix:
    """Undo compressed-tensors' packing; codes are stored offset by half their range.

    Args:
        packed: [rows, columns * bits / 32].
        scales: [rows, num_groups].
        zeros: [rows * bits / 32, num_groups]; None: half the range.
        g_idx: [columns], the group of each column, or None; all -1 if there is no reordering.
    """
    _check_matrices(weight_packed=packed, weight_scale=scales)
    rows, num_groups = packed.shape[0], scales.shape[1]
    bits = packed.shape[1] * 32 // columns
    _check(
        bits in (4, 8) and packed.shape[1] * 32 == columns * bits and scales.shape[0] == rows,
        f"weight_packed and weight_scale do not fit {columns} columns: {packed.shape} and {scales.shape}",
    )
    codes = np.ascontiguousarray(packed).view(np.uint8)
    if zeros is None:
        points = np.full(scales.shape, 1 << bits - 1, np.uint8)
    else:
        _check_matrices(weight_zero_point=zeros)
        points = np.ascontiguousarray(_by_byte(np.ascontiguousarray(zeros.T), bits)[:, :rows].T)
        _check(points.shape == scales.shape, f"weight_zero_point does not fit: {zeros.shape}")
    if g_idx is not None and g_idx.shape == (columns,) and (g_idx == -1).all():
        g_idx = None
    return IntegerMatrix(codes, scales, points, bits, _read_groups(g_idx, columns, num_groups))


def float8_scales(scales: Floats, block: tuple[int, int] | None, shape: tuple[int, int], run: int) -> Floats:
    """Return FP8 scales per run of columns, [rows, columns / run], from any granularity in the file.

    Args:
        scales: One for the matrix, one per row, or one per block of `block` rows and columns.
        run: Number of columns; divides those of a block.
    """
    rows, columns = shape
    if scales.size == 1:
        return np.full((rows, columns // run), scales.reshape(()), np.float32)
    if scales.shape in ((rows,), (rows, 1)):
        return np.repeat(scales.reshape(rows, 1), columns // run, axis=1)
    _check(block is not None, f"scales of shape {scales.shape} need `weight_block_size`")
    assert block is not None
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    _check(scales.shape == wanted, f"scales of shape {scales.shape} do not fit blocks of {block} in {shape}")
    by_row = scales[np.arange(rows) // block[0]]
    return np.ascontiguousarray(by_row[:, np.arange(0, columns, run) // block[1]])


def _awq_rows(words: Words) -> Bytes:
    """Unpack [n, rows / 8] words into [n, rows] nibbles, one byte each."""
    data = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((*words.shape, 8), np.uint8)
    for place, row in enumerate(_AWQ_ORDER):
        out[..., row] = data[..., place // 2] >> 4 * (place % 2) & 15
    return out.reshape(words.shape[0], -1)


def _by_byte(words: Words, bits: int) -> Bytes:
    """Unpack [n, m] words into [n, m * 32 / bits] codes, one byte each."""
    data = words.view(np.uint8)
    return data if bits == 8 else np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1)


def _read_groups(g_idx: Words | None, columns: int, num_groups: int) -> npt.NDArray[np.int64] | None:
    """Check the group of each column; return None if the groups are consecutive and of equal size."""
    if g_idx is None:
        _check(columns % num_groups == 0, f"{columns} columns cannot be {num_groups} equal groups")
        return None
    _check(
        g_idx.shape == (columns,) and int(g_idx.min()) >= 0 and int(g_idx.max()) < num_groups,
        f"g_idx must give one of {num_groups} groups for each of {columns} columns",
    )
    if columns % num_groups == 0 and np.array_equal(g_idx, np.arange(columns) // (columns // num_groups)):
        return None
    return g_idx.astype(np.int64)


def _check_matrices(**arrays: npt.NDArray[Any]) -> None:
    """Refuse arrays that are not matrices or are empty, because a file's shapes are untrusted."""
    for name, array in arrays.items():
        _check(array.ndim == 2 and array.size > 0, f"{name} has the shape {list(array.shape)}, no matrix's")


def _read_block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    _check(
        isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value),
        f"`weight_block_size` must be two positive integers, got {str(value)[:100]}",
    )
    _check(value[1] % 32 == 0, f"`weight_block_size` must have a multiple of 32 columns, got {value[1]}")
    return value[0], value[1]


def _find_weights(groups: Any) -> dict[str, Any]:
    """Return the merged weight options of all of compressed-tensors' module groups."""
    found: dict[str, Any] = {}
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            found |= {key: value for key, value in weights.items() if value is not None}
    return found


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ModelLoadError(message)
