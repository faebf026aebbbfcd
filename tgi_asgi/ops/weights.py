"""Weights as the operators want them, made from what the files hold.

`models/loading` wraps a tensor's bytes in a `WeightSource` and calls a constructor; only this file and the
kernels know what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops.cuda_quant import PIECE_BYTES, CudaQuantMatrix, Repacking, can_repack, repack
from tgi_asgi.ops.grouped import GROUPED, decode_grouped, float8_blocks, for_cpu, int4_blocks, int8_blocks
from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.packed import (
    BLOCKS,
    PackedMatrix,
    Packing,
    head_order,
    interleaved_order,
    ordered_bias,
    pack,
    plain_order,
    unpack,
)

NATIVE_FORMATS = frozenset(BLOCKS)  # of GGUF files: what a `WeightSource` can hold as it is there
_FORMATS = BLOCKS | GROUPED
_DECODED = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"})  # what the operator `dequantise` reads
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# How products compute: eagerly in a dtype, or in a step recorded for the CPU or a CUDA device.
Arithmetic = torch.dtype | Packing | Repacking


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A tensor as its file holds it.

        WeightSource(gguf.raw(name), "Q4_1", (576, 1536))
        WeightSource(array.view(np.uint8), "F32", (576, 576))

    Attributes:
        data: its bytes, uint8, contiguous; may be a view of a mapped file, read only while constructing.
        format: one of `NATIVE_FORMATS`, or of those that `integer_source` and `float8_source` make; anything
            else is decoded to float32 by the caller first.
        shape: (rows, columns) with rows outermost in memory, or (elements,).
        order: [columns], which column of the matrix each of the data's is (GPTQ's act-order); None: the same.

    Raises:
        ValueError: the format is not native, or the bytes are not as many as format and shape say.
    """

    data: npt.NDArray[np.uint8]
    format: str
    shape: tuple[int, ...]
    order: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ValueError(f"`format` must be one of {', '.join(sorted(_FORMATS))}, got {self.format}")
        if len(self.shape) not in (1, 2):
            raise ValueError(f"`shape` must have one or two sizes, got {self.shape}")
        elements, size = _FORMATS[self.format]
        if self.shape[-1] % elements:
            raise ValueError(f"{self.format} needs rows of a multiple of {elements}, got {self.shape}")
        if self.data.dtype != np.uint8 or not self.data.flags.c_contiguous:
            raise ValueError("`data` must be contiguous uint8")
        needed = int(np.prod(self.shape, dtype=np.int64)) // elements * size
        if self.data.size != needed:
            raise ValueError(f"{self.format} of shape {self.shape} has {needed} bytes, got {self.data.size}")


def integer_source(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.uint8],
    bits: int,
    order: npt.NDArray[np.int64] | None = None,
) -> WeightSource | None:
    """Wrap a matrix of weights scale * (code - zero) as it is; None if no format holds it.

    Groups must be multiples of 32 columns; zero points of codes of eight bits 128, their scales float16's.

    Args:
        codes: [rows, columns * bits / 8], of two nibbles the first in the low half.
        scales, zeros: [rows, num_groups], of equal groups of columns.
        bits: 4 or 8.
        order: as `WeightSource` has it.
    """
    made = (int4_blocks if bits == 4 else int8_blocks)(codes, scales, zeros)
    return None if made is None else WeightSource(*made, (codes.shape[0], codes.shape[1] * 8 // bits), order)


def float8_source(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> WeightSource:
    """Wrap a matrix of E4M3 codes [rows, columns] with scales [rows, columns / run], a run 32, 64 or 128."""
    return WeightSource(*float8_blocks(codes, scales), codes.shape)


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A matrix W of `a @ W.T (+ bias)`; also what `embed` gathers from. Opaque above `ops`."""

    matrix: Tensor | PackedMatrix | CudaQuantMatrix  # [rows, columns]; a tensor is float32 or bfloat16
    bias: Tensor | None = None  # [rows] float32

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return int(self.matrix.shape[0])

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return int(self.matrix.shape[1])

    @property
    def is_packed(self) -> bool:
        """Whether it was made for a recorded step; otherwise for eager calls."""
        return isinstance(self.matrix, PackedMatrix)

    @property
    def num_bytes(self) -> int:
        """Memory that the weight takes."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.matrix.nbytes + bias


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each head's queries and keys before they are rotated (Qwen3)."""

    query: Tensor  # [head_dim] float32, one for all heads
    key: Tensor  # the same
    eps: float


@dataclass(frozen=True, slots=True)
class QkvWeight:
    """The query, key and value projections as one product. Opaque above `ops`."""

    linear: LinearWeight  # rows: queries, keys, values
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norms: HeadNorms | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the weight takes."""
        return self.linear.num_bytes


@dataclass(frozen=True, slots=True)
class GateUpWeight:
    """The gate and up projections as one product. Opaque above `ops`."""

    linear: LinearWeight  # rows: gate, up

    @property
    def intermediate_size(self) -> int:
        """Number of outputs after the gate."""
        return self.linear.rows // 2

    @property
    def num_bytes(self) -> int:
        """Memory that the weight takes."""
        return self.linear.num_bytes


def vector(source: WeightSource) -> Tensor:
    """Return a norm's weight or a bias as float32 [elements]."""
    return _decode(source).reshape(-1)


def linear_weight(
    source: WeightSource, *, dtype: Arithmetic, bias: WeightSource | None = None
) -> LinearWeight:
    """Make the weight of `linear_add`, `head` and `embed` from a [rows, columns] source.

    `dtype` is that of the arithmetic, float32 or bfloat16, a `Packing` or a `Repacking`, whose device has it.
    """
    biases = None if bias is None else [bias]
    return _linear([source], dtype, biases, lambda: plain_order(source.shape[0]))


def qkv_weight(
    query: WeightSource,
    key: WeightSource,
    value: WeightSource,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Arithmetic,
    biases: tuple[WeightSource, WeightSource, WeightSource] | None = None,
    norms: HeadNorms | None = None,
    is_interleaved: bool = False,
) -> QkvWeight:
    """Make the weight of `qkv` from [heads * head_dim, columns] sources.

    `is_interleaved` says that rotary pairs are neighbouring rows of query and key, as GGUF's `llama` files
    have them; they are put into two halves here, so that one rotation serves all files.

    Raises:
        ValueError: a source has other rows than the heads say, or a norm is not of a head's size.
    """
    parts = (query, key, value)
    for name, part, heads in zip(
        ("query", "key", "value"), parts, (num_heads, num_kv_heads, num_kv_heads), strict=True
    ):
        if part.shape[0] != heads * head_dim:
            raise ValueError(f"`{name}` must have {heads} x {head_dim} rows, got {part.shape[0]}")
    if norms is not None and not norms.query.shape == norms.key.shape == (head_dim,):
        raise ValueError(f"`norms` must have {head_dim} elements each")
    if is_interleaved:
        query, key = _halve_pairs(query, head_dim), _halve_pairs(key, head_dim)
        if biases is not None:
            biases = (_halve_pairs(biases[0], head_dim), _halve_pairs(biases[1], head_dim), biases[2])
    linear = _linear(
        [query, key, value],
        dtype,
        biases,
        lambda: head_order(num_heads + num_kv_heads, num_kv_heads, head_dim),
    )
    return QkvWeight(linear, num_heads, num_kv_heads, head_dim, norms)


def gate_up_weight(
    gate: WeightSource,
    up: WeightSource,
    *,
    dtype: Arithmetic,
    biases: tuple[WeightSource, WeightSource] | None = None,
) -> GateUpWeight:
    """Make the weight of `gate_up` from two [intermediate, columns] sources.

    Raises:
        ValueError: the two differ in shape.
    """
    if gate.shape != up.shape:
        raise ValueError(f"`gate` and `up` must have one shape, got {gate.shape} and {up.shape}")
    if isinstance(dtype, Packing) and gate.format != up.format:  # their panels alternate: one format for both
        gate, up = _as_float32(gate), _as_float32(up)
    return GateUpWeight(_linear([gate, up], dtype, biases, lambda: interleaved_order(gate.shape[0])))


def _linear(
    sources: Sequence[WeightSource],
    dtype: Arithmetic,
    biases: Sequence[WeightSource] | None,
    order: Callable[[], npt.NDArray[np.int64]],
) -> LinearWeight:
    """Stack sources by rows into one matrix; a packed one has its rows in `order`."""
    rows, columns = sum(source.shape[0] for source in sources), sources[0].shape[-1]
    if any(len(source.shape) != 2 or source.shape[1] != columns for source in sources):
        raise ValueError(f"a matrix must have {columns} columns, got {[source.shape for source in sources]}")
    bias = None if biases is None else torch.cat([vector(part) for part in biases])
    if bias is not None and bias.shape[0] != rows:
        raise ValueError(f"the bias must have {rows} elements, got {bias.shape[0]}")
    if isinstance(dtype, Repacking) and can_repack(sources):
        return LinearWeight(repack(sources, dtype.device), bias)
    sources = [_in_order(source) for source in sources]
    if isinstance(dtype, Packing):
        raw = [_stored(source, dtype) for source in for_cpu(sources, dtype)]
        wanted = order()
        return LinearWeight(pack(raw, columns, wanted, dtype), ordered_bias(bias, wanted))
    if isinstance(dtype, Repacking):
        matrix = torch.empty(rows, columns, dtype=dtype.dtype, device=dtype.device)
    elif dtype in (torch.float32, torch.bfloat16):
        matrix = torch.empty(rows, columns, dtype=dtype)
    else:
        raise ValueError(f"`dtype` must be float32 or bfloat16, got {dtype}")
    parts = torch.split(matrix, [source.shape[0] for source in sources])
    for part, source in zip(parts, sources, strict=True):
        _write(part, source)
    return LinearWeight(matrix, bias)


def _write(matrix: Tensor, source: WeightSource) -> None:
    """Write a source's weights to a matrix of any dtype and device, rounded once.

    They cross to a device as the file has them, and are rounded there: rounding here would take as much
    memory again.
    """
    plain = _PLAIN.get(source.format)
    weights = _decode(source) if plain is None else _as_tensor(source.data).view(plain).view(source.shape)
    num_rows = max(PIECE_BYTES // (weights.shape[1] * weights.itemsize), 1)
    for target, piece in zip(torch.split(matrix, num_rows), torch.split(weights, num_rows), strict=True):
        target.copy_(piece.to(matrix.device))


def _in_order(source: WeightSource) -> WeightSource:
    """Put a source's columns in their own order: no block holds groups that lie apart, so in float16."""
    if source.order is None:
        return source
    weights = torch.empty(source.shape, dtype=torch.float16)
    weights[:, torch.from_numpy(source.order)] = _decode(source).half()
    return WeightSource(weights.numpy().reshape(-1).view(np.uint8), "F16", source.shape)


def _decode(source: WeightSource) -> Tensor:
    """Return a source as float32 of its shape, its columns as they lie."""
    if source.format in GROUPED:
        return torch.from_numpy(decode_grouped(source.data, source.format, source.shape))
    data = _as_tensor(source.data)
    if source.format not in _DECODED:  # by way of the panels, which all formats have
        rows = int(np.prod(source.shape[:-1]))
        packed = pack([(data, source.format)], source.shape[-1], plain_order(rows), Packing(is_exact=True))
        return unpack(packed)[:rows].reshape(source.shape)
    out = torch.empty(source.shape, dtype=torch.float32)
    torch.ops.tgi.dequantise(data, source.format, out)
    return out


def _stored(source: WeightSource, packing: Packing) -> tuple[Tensor, str]:
    """Return a matrix's bytes and format as they will be packed: the file's own, unless it is quantised."""
    rows, columns = source.shape
    name = packing.format_of(source.format, rows, columns)
    if name == source.format:
        return _as_tensor(source.data), name
    elements, size = BLOCKS[name]
    out = torch.empty(rows * columns // elements * size, dtype=torch.uint8)
    torch.ops.tgi.quantise_rows(_decode(source), name, out)
    return out, name


def _as_float32(source: WeightSource) -> WeightSource:
    return WeightSource(_decode(_in_order(source)).numpy().reshape(-1).view(np.uint8), "F32", source.shape)


def _as_tensor(data: npt.NDArray[np.uint8]) -> Tensor:
    """Wrap bytes without a copy; torch warns about read-only memory, which the kernel only reads."""
    if data.flags.writeable:
        return torch.from_numpy(data.reshape(-1))
    if data.size == 0:
        return torch.empty(0, dtype=torch.uint8)
    interface = dict(data.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    view = _Borrowed(interface, data)
    return torch.as_tensor(np.asarray(view).reshape(-1))


class _Borrowed:
    """Present read-only memory as writable, and keep its owner alive."""

    def __init__(self, interface: dict[str, object], owner: object) -> None:
        self.__array_interface__ = interface
        self._owner = owner


def _halve_pairs(source: WeightSource, head_dim: int) -> WeightSource:
    """Reorder rows 0 1 2 3 ... of each head to 0 2 4 ... 1 3 5 ...: whole rows move, so any format does."""
    heads = source.shape[0] // head_dim
    rows = source.data.reshape(heads, head_dim // 2, 2, -1)
    return replace(source, data=np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1))


@meta_of("dequantise")
def _dequantise_meta(blocks: Tensor, format: str, out: Tensor) -> None:
    elements, size = BLOCKS[format]
    require(out.numel() * size == blocks.numel() * elements)
