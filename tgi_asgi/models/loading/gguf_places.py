"""Where a GGUF file has the weights of a module of `transformers`, one class for each way to store them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile, GgufTensor
from tgi_asgi.models.gguf_module import GgufModule
from tgi_asgi.models.loading.gguf_tensors import held_format, join_rotary_halves
from tgi_asgi.ops import WeightSource
from tgi_asgi.ops.arrays import Floats

# Reads rows [start, stop) of a tensor, which has the given shape.
ReadRows: TypeAlias = Callable[[GgufTensor, int, int, tuple[int, ...]], WeightSource]


@dataclass(frozen=True)
class Place(ABC):
    """Where a weight is.

    Attributes:
        tensors: The file's tensors that it is made from.
        shape: Its shape in the model.
    """

    tensors: Sequence[GgufTensor]
    shape: tuple[int, ...]

    @property
    def format(self) -> str:
        """The format in which it is read, unless a second scale of NVFP4 has it decoded."""
        formats = {held_format(info.type) for info in self.tensors}
        return formats.pop() if len(formats) == 1 else "F32"

    @abstractmethod
    def read(self, rows: ReadRows, shape: tuple[int, ...], start: int, stop: int) -> WeightSource:
        """Return [start, stop) along the first dimension of the weight, which the model gives this shape."""


class _Plain(Place):
    """The weight is a tensor."""

    def read(self, rows: ReadRows, shape: tuple[int, ...], start: int, stop: int) -> WeightSource:
        return rows(self.tensors[0], start, stop, (shape[0] if shape else 1, *shape[1:]))


@dataclass(frozen=True)
class _Slice(Place):
    """The weight is [first, last) of a tensor's first dimension: some rows, or a matrix of a stack."""

    first: int
    last: int

    def read(self, rows: ReadRows, shape: tuple[int, ...], start: int, stop: int) -> WeightSource:
        (info,) = self.tensors
        matrix = rows(info, self.first, self.last, info.shape)
        is_whole = not shape or stop - start == shape[0]
        return matrix if is_whole else matrix.rows(start, stop)


@dataclass(frozen=True)
class _Ordered(Place):
    """The weight is a tensor in another order.

    Attributes:
        row_order: The tensor's row of each row of the weight.
        column_order: The weight's column of each column of the tensor.
        restore: Undoes a change to the values.
    """

    row_order: npt.NDArray[np.int64] | None
    column_order: npt.NDArray[np.int64] | None
    restore: Callable[[Floats], Floats] | None

    @property
    def format(self) -> str:
        return super().format if self.restore is None else "F32"

    def read(self, rows: ReadRows, shape: tuple[int, ...], start: int, stop: int) -> WeightSource:
        (info,) = self.tensors
        source = rows(info, 0, info.shape[0], info.shape)
        if self.row_order is not None:
            source = source.in_rows(self.row_order)
        if self.restore is not None:
            source = ops.from_floats(self.restore(ops.decode(source)).reshape(shape))
        if self.column_order is not None:
            source = source.with_order(self.column_order)
        return source.rows(start, stop)


@dataclass(frozen=True)
class _Made(Place):
    """The weight is computed from all values of one tensor or several."""

    make: Callable[..., Floats]

    @property
    def format(self) -> str:
        return "F32"

    def read(self, rows: ReadRows, shape: tuple[int, ...], start: int, stop: int) -> WeightSource:
        stored = [
            ops.decode(rows(info, 0, info.shape[0], info.shape)).reshape(info.shape) for info in self.tensors
        ]
        values = self.make(*stored).reshape(shape)[start:stop]
        return ops.from_floats(values.reshape(-1, shape[-1]) if len(shape) > 2 else values)


class _JoinedStacks(Place):
    """The weight is a stack of matrices, whose first rows are in one stack and whose others in a second."""

    def read(self, rows: ReadRows, shape: tuple[int, ...], start: int, stop: int) -> WeightSource:
        numbers = range(start, stop)
        return ops.stack_rows([rows(each, n, n + 1, each.shape) for n in numbers for each in self.tensors])


def places_of(stored: str, file: GgufFile, module: GgufModule, head_dim: int | None) -> dict[str, Place]:
    """Return the module's weights that a file's tensor holds, by their names, and where each is.

    Args:
        head_dim: Size of a head, for the module's `paired` tensors.

    Raises:
        ModelLoadError: if the tensor's shape does not allow it.
    """
    info = file.tensor(stored)
    if joined := module.joined_of(stored):
        own, *pair = joined
        return {own: _joined(*map(file.tensor, pair))}
    if merged := module.merged_of(stored):
        own, how, pair = merged
        tensors = [file.tensor(each) for each in pair]
        return {own: _Made(tensors, how.shape(*(each.shape for each in tensors)), how.make)}
    if parts := module.parts_of(stored):
        size, rest = divmod(info.shape[0], len(parts))
        if rest:
            raise ModelLoadError(f"tensor {stored!r} must have a multiple of {len(parts)} rows")
        shape = (size, *info.shape[1:])
        return {
            name: _Slice([info], shape, index * size, (index + 1) * size) for index, name in enumerate(parts)
        }
    name = module.name_of(stored)
    if name is None:
        if _is_scale_of_nvfp4(file, stored):
            return {}  # read with its matrix
        name = stored  # which is refused, as the model has no place for it
    if "*" in name:
        shape, count = info.shape[1:], info.shape[0]
        return {name.replace("*", str(at)): _Slice([info], shape, at, at + 1) for at in range(count)}
    return {name: _changed(stored, info, module, head_dim)}


def _changed(stored: str, info: GgufTensor, module: GgufModule, head_dim: int | None) -> Place:
    """Return the place of a weight that is one tensor, with what the converter has done to it undone."""
    row_order, column_order = module.orders_of(stored)
    if module.is_paired(stored) and head_dim is not None:
        row_order = _halves_first(info, head_dim)
    restore, shape = module.restore_of(stored), module.shape_of(stored, info.shape)
    if row_order is not None or column_order is not None:
        return _Ordered([info], shape, row_order, column_order, restore)
    return _Plain([info], shape) if restore is None else _Made([info], shape, restore)


def _halves_first(info: GgufTensor, head_dim: int) -> npt.NDArray[np.int64]:
    """Return the tensor's row of each row of a weight whose rows it stores in rotary pairs."""
    if head_dim % 2 or info.shape[0] % head_dim:
        raise ModelLoadError(f"tensor {info.name!r} must have whole heads of {head_dim} rows, in pairs")
    return join_rotary_halves(np.arange(info.shape[0]), info.shape[0], head_dim)


def _joined(first: GgufTensor, second: GgufTensor) -> Place:
    if len(first.shape) != 3 or len(second.shape) != 3 or first.shape[::2] != second.shape[::2]:
        raise ModelLoadError(
            f"tensors {first.name!r} and {second.name!r} must be stacks of the same matrices"
        )
    num_matrices, num_rows, num_columns = first.shape
    return _JoinedStacks([first, second], (num_matrices, num_rows + second.shape[1], num_columns))


def _is_scale_of_nvfp4(file: GgufFile, stored: str) -> bool:
    stem, _, kind = stored.rpartition(".")
    matrix = file.tensors.get(f"{stem}.weight")
    return kind in ("scale", "input_scale") and matrix is not None and matrix.type == "NVFP4"
