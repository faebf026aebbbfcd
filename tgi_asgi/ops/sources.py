"""Tensors as files hold them, and their decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.formats import FORMATS, float8_blocks, int4_blocks, int8_blocks

# The words of the formats that hold each number by itself.
WORDS: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A tensor as its file holds it.

        WeightSource(gguf.raw(name), "Q4_1", (576, 1536))
        WeightSource(array.view(np.uint8), "F32", (576, 576))

    Attributes:
        data: Its bytes, uint8, contiguous; may be a view of a mapped file, which is read only while weights
            are constructed.
        format: One of `FORMATS`.
        shape: (rows, columns) with rows outermost in memory, or (elements,).
        order: [columns], the matrix column of each column of the data (GPTQ's act-order); None: the same
            column.
        is_decoded: Whether float32 values were decoded from at most eight bits, in which case they may be
            rounded to bfloat16, like FP8's.

    Raises:
        ValueError: if the format is unknown, or the number of bytes does not match format and shape.
    """

    data: npt.NDArray[np.uint8]
    format: str
    shape: tuple[int, ...]
    order: npt.NDArray[np.int64] | None = None
    is_decoded: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"`format` must be one of {', '.join(sorted(FORMATS))}, got {self.format}")
        if len(self.shape) not in (1, 2):
            raise ValueError(f"`shape` must have one or two sizes, got {self.shape}")
        if self.data.dtype != np.uint8 or not self.data.flags.c_contiguous:
            raise ValueError("`data` must be contiguous uint8")
        info = FORMATS[self.format]
        if self.shape[-1] % info.block_columns:
            raise ValueError(
                f"{self.format} needs rows of a multiple of {info.block_columns}, got {self.shape}"
            )
        needed = int(np.prod(self.shape, dtype=np.int64)) // info.block_columns * info.block_bytes
        if self.data.size != needed:
            raise ValueError(f"{self.format} of shape {self.shape} has {needed} bytes, got {self.data.size}")

    def rows(self, start: int, stop: int) -> WeightSource:
        """Return rows [start, stop) of a matrix, or elements of a vector: a view."""
        data = self.data.reshape(self.shape[0], -1)[start:stop].reshape(-1)
        return replace(self, data=data, shape=(stop - start, *self.shape[1:]))

    def columns(self, start: int, stop: int) -> WeightSource:
        """Return columns [start, stop) of a matrix: a copy, in floats if the matrix has an order.

        Raises:
            ValueError: if the range begins or ends within a block of the format.
        """
        source = self.in_order()
        info = FORMATS[source.format]
        if start % info.block_columns or stop % info.block_columns:
            raise ValueError(f"columns {start} to {stop} are not whole blocks of {source.format}")
        blocks = source.data.reshape(self.shape[0], -1, info.block_bytes)
        found = blocks[:, start // info.block_columns : stop // info.block_columns]
        return replace(
            source, data=np.ascontiguousarray(found).reshape(-1), shape=(self.shape[0], stop - start)
        )

    def in_rows(self, order: npt.NDArray[np.int64]) -> WeightSource:
        """Return the rows of a matrix, or the elements of a vector, at these indices: a copy."""
        data = np.ascontiguousarray(self.data.reshape(self.shape[0], -1)[order]).reshape(-1)
        return replace(self, data=data, shape=(len(order), *self.shape[1:]))

    def with_order(self, order: npt.NDArray[np.int64]) -> WeightSource:
        """Return the matrix whose columns the data has in this order; floats are sorted into their places."""
        if self.format not in WORDS:
            return replace(self, order=order)
        words = self.data.view(WORDS[self.format]).reshape(self.shape)
        return replace(self, data=words[:, np.argsort(order)].reshape(-1).view(np.uint8))

    def in_order(self) -> WeightSource:
        """Return the matrix with its columns in order, as floats, because a group's columns are not adjacent.

        The result is float16, as AutoGPTQ computes, or float32 if a float16 value would be infinite.
        """
        if self.order is None:
            return self
        halves = _C.decode_halves(self.data, self.format, self.shape[-1], self.order)
        if halves is not None:
            return from_floats(halves.view(np.float16))
        weights = np.empty(self.shape, np.float32)
        weights[:, self.order] = decode(replace(self, order=None))
        return from_floats(weights)

    def transposed(self, num_matrices: int = 1) -> WeightSource:
        """Return the transpose of each of the matrices that are stacked by rows: a copy.

        Raises:
            ValueError: if the format's blocks run along rows.
        """
        if self.format not in WORDS:
            raise ValueError(f"matrices in {self.format} cannot be transposed: decode them first")
        rows, columns = self.shape
        words = self.data.view(WORDS[self.format]).reshape(num_matrices, rows // num_matrices, columns)
        data = np.ascontiguousarray(words.swapaxes(1, 2)).reshape(-1).view(np.uint8)
        return replace(self, data=data, shape=(num_matrices * columns, rows // num_matrices))


def every_nth_row(source: WeightSource, first: int, step: int) -> WeightSource:
    """Return every `step`-th row of a matrix, from row `first` on: a copy."""
    data = np.ascontiguousarray(source.data.reshape(source.shape[0], -1)[first::step])
    return replace(source, data=data.reshape(-1), shape=(len(data), source.shape[1]))


def integer_source(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.uint8],
    bits: int,
    order: npt.NDArray[np.int64] | None = None,
) -> WeightSource | None:
    """Wrap a matrix of weights scale * (code - zero) without rounding; return None if no format holds it.

    Groups must be multiples of 32 columns, and scales must be exact in float16. With 8-bit codes the zero
    points must be 128.

    Args:
        codes: [rows, columns * bits / 8], of two nibbles the first in the low half.
        scales, zeros: [rows, num_groups], of groups of equal size.
        bits: 4 or 8.
        order: Column order, as in `WeightSource`.
    """
    made = (int4_blocks if bits == 4 else int8_blocks)(codes, scales, zeros)
    return None if made is None else WeightSource(*made, (codes.shape[0], codes.shape[1] * 8 // bits), order)


def float8_source(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]) -> WeightSource:
    """Wrap E4M3 codes [rows, columns] with scales [rows, columns / run], where run is 32, 64 or 128."""
    return WeightSource(*float8_blocks(codes, scales), codes.shape)


def decoded_source(weights: Floats) -> WeightSource:
    """Wrap weights [rows, columns] that were decoded from at most eight bits each."""
    return WeightSource(
        np.ascontiguousarray(weights).reshape(-1).view(np.uint8), "F32", weights.shape, is_decoded=True
    )


def decode(source: WeightSource) -> Floats:
    """Return a source as float32 in its shape, its columns in stored order; a view if it is F32."""
    if source.format == "F32":
        return source.data.view(np.float32).reshape(source.shape)
    rows = _C.decode_rows(source.data.reshape(-1), source.format, source.shape[-1])
    return rows.reshape(source.shape)


def stack_rows(sources: Sequence[WeightSource]) -> WeightSource:
    """Return several matrices stacked by rows; if they share a format, their bytes are kept.

    Raises:
        ValueError: if their numbers of columns differ.
    """
    if len(sources) == 1:
        return sources[0]
    sources = [source.in_order() for source in sources]
    if len({source.shape[1] for source in sources}) > 1:
        raise ValueError(f"the matrices must have the same columns, got {[each.shape for each in sources]}")
    is_decoded = all(source.is_decoded for source in sources)
    if len({source.format for source in sources}) > 1:
        return from_floats(np.concatenate([decode(source) for source in sources]))
    data = np.concatenate([source.data for source in sources])
    rows = sum(source.shape[0] for source in sources)
    return WeightSource(data, sources[0].format, (rows, sources[0].shape[1]), is_decoded=is_decoded)


def from_floats(values: npt.NDArray[np.float32] | npt.NDArray[np.float16]) -> WeightSource:
    """Wrap float32 or float16 values."""
    name = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}[values.dtype]
    return WeightSource(np.ascontiguousarray(values).reshape(-1).view(np.uint8), name, values.shape)


def rounded(source: WeightSource) -> WeightSource:
    """Return a matrix of any format in bfloat16."""
    bits = _C.decode_bfloat16(source.data.reshape(-1), source.format, source.shape[-1])
    return WeightSource(bits.reshape(-1).view(np.uint8), "BF16", source.shape)


def as_bfloat16(values: Floats) -> WeightSource:
    """Wrap float32 values, rounded to bfloat16."""
    bits = _C.bfloat16_bits(np.ascontiguousarray(values))
    return WeightSource(bits.reshape(-1).view(np.uint8), "BF16", values.shape)
