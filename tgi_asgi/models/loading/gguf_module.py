"""Weights of a GGUF file under the names that a checkpoint of `transformers` has for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile, GgufTensor
from tgi_asgi.models.gguf_module import GgufModule, layer_of
from tgi_asgi.models.loading.gguf_tensors import (
    GgufTensors,
    held_format,
    join_rotary_halves,
    without_ones,
)
from tgi_asgi.models.loading.weights import WHOLE, check_shape
from tgi_asgi.ops import WeightSource
from tgi_asgi.ops.arrays import Floats


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight is: in a tensor, at an index of a stack, or in one of equal parts of a tensor's rows.

    Attributes:
        restore: How its values become the model's.
        restored: Their shape then.
        pair_dim: Size of a head whose rows are stored in rotary pairs.
        below: A stack whose matrices' rows come below those of `info`.
        beside: A tensor of which `restore` makes one with `info`.
        rows_of, columns_of: As `row_orders` and `column_orders` of `GgufModule`.
    """

    info: GgufTensor
    index: int | None = None
    num_parts: int | None = None  # None: `index` is that of a stack
    restore: Callable[..., Floats] | None = None
    restored: tuple[int, ...] | None = None
    pair_dim: int | None = None
    below: GgufTensor | None = None
    beside: GgufTensor | None = None
    rows_of: npt.NDArray[np.int64] | None = None
    columns_of: npt.NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.restored is not None:
            return self.restored
        if self.below is not None:
            count, rows, columns = self.info.shape
            return (count, rows + self.below.shape[1], columns)
        if self.num_parts is not None:
            return (self.info.shape[0] // self.num_parts, *self.info.shape[1:])
        return self.info.shape if self.index is None else self.info.shape[1:]

    @property
    def format(self) -> str:
        """The format in which `get` returns it, unless a second scale of NVFP4 has it decoded."""
        own = held_format(self.info.type)
        is_mixed = self.below is not None and held_format(self.below.type) != own
        return "F32" if self.restore is not None or is_mixed else own

    @property
    def rows(self) -> tuple[int, int]:
        """The first of the tensor's rows, and the last plus one."""
        size = 1 if self.num_parts is None else self.shape[0]
        return (0, self.info.shape[0]) if self.index is None else (self.index * size, (self.index + 1) * size)


def _is_scale_of_nvfp4(file: GgufFile, stored: str) -> bool:
    stem, _, kind = stored.rpartition(".")
    matrix = file.tensors.get(f"{stem}.weight")
    return kind in ("scale", "input_scale") and matrix is not None and matrix.type == "NVFP4"


def _joined_place(first: GgufTensor, second: GgufTensor) -> _Place:
    if len(first.shape) != 3 or len(second.shape) != 3 or first.shape[::2] != second.shape[::2]:
        raise ModelLoadError(
            f"tensors {first.name!r} and {second.name!r} must be stacks of the same matrices"
        )
    return _Place(first, below=second)


def _places_of(stored: str, file: GgufFile, module: GgufModule, head_dim: int | None) -> dict[str, _Place]:
    """Return the module's tensors that a file's tensor holds, by their names, and where each is."""
    info = file.tensor(stored)
    if joined := module.joined_of(stored):
        own, *pair = joined
        return {own: _joined_place(*map(file.tensor, pair))}
    if merged := module.merged_of(stored):
        own, how, pair = merged
        first, second = map(file.tensor, pair)
        shape = how.shape(first.shape, second.shape)
        return {own: _Place(first, restore=how.make, restored=shape, beside=second)}
    if parts := module.parts_of(stored):
        if info.shape[0] % len(parts):
            raise ModelLoadError(f"tensor {stored!r} must have a multiple of {len(parts)} rows")
        return {name: _Place(info, index, len(parts)) for index, name in enumerate(parts)}
    name = module.name_of(stored)
    if name is None:
        if _is_scale_of_nvfp4(file, stored):
            return {}  # read with its matrix
        name = stored  # which is refused, as the model has no place for it
    if "*" in name:
        return {name.replace("*", str(index)): _Place(info, index) for index in range(info.shape[0])}
    rows, columns = module.orders_of(stored)
    place = _Place(
        info, restore=module.restore_of(stored), restored=module.shape_of(stored, info.shape),
        pair_dim=head_dim if module.is_paired(stored) else None, rows_of=rows, columns_of=columns,
    )  # fmt: skip
    return {name: place}


class GgufModuleWeights(GgufTensors):
    """The `NamedWeights` of an open GGUF file, which `close` closes.

    Args:
        num_layers: The model's. Further ones only draft, and are not read.
        head_dim: Size of a head, for the module's `paired` tensors.
    """

    def __init__(
        self, file: GgufFile, module: GgufModule, num_layers: int, head_dim: int | None = None
    ) -> None:
        super().__init__(file)
        self._places: dict[str, _Place] = {}
        for stored in file.names:
            if stored in module.unused or (layer_of(stored) or 0) >= num_layers:
                self._unread.discard(stored)
                continue
            self._places |= _places_of(stored, file, module, head_dim)
        tensors = [
            each for place in self._places.values() for each in (place.info, place.below, place.beside)
        ]
        self._named = {info.name for info in tensors if info is not None}

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def _find(self, name: str) -> _Place:
        if name not in self._places:
            raise ModelLoadError(f"the GGUF file has no tensor for {name!r}, which the model needs")
        return self._places[name]

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        place = self._find(name)
        info = place.info
        is_flat = len(shape) == 1 and math.prod(place.shape) == shape[0]  # norms of groups are matrices
        if without_ones(place.shape) != without_ones(shape) and not is_flat:
            check_shape(info.name, place.shape, shape)
        if place.index is not None:
            matrix = self._part(info, *place.rows, info.shape)
            return matrix if part == WHOLE else matrix.rows(*part.indices(shape[0])[:2])
        count = shape[0] if shape else 1
        start, stop, _ = part.indices(count)
        if place.below is not None:
            matrices = [
                self._part(each, index, index + 1, each.shape)
                for index in range(start, stop)
                for each in (info, place.below)
            ]
            return ops.stack_rows(matrices)
        if place.pair_dim is not None:
            return self._joined(info, place.pair_dim, shape).rows(start, stop)
        if place.rows_of is not None or place.columns_of is not None:
            return self._ordered(place, shape).rows(start, stop)
        if place.restore is None:
            return self._part(info, start, stop, (count, *shape[1:]))
        stored = [self._values(each) for each in (info, place.beside) if each is not None]
        values = place.restore(*stored).reshape(shape)[start:stop]
        return ops.from_floats(values.reshape(-1, shape[-1]) if len(shape) > 2 else values)

    def _values(self, info: GgufTensor) -> Floats:
        found: Floats = ops.decode(self._part(info, 0, info.shape[0], info.shape)).reshape(info.shape)
        return found

    def _ordered(self, place: _Place, shape: tuple[int, ...]) -> WeightSource:
        """Return a tensor with its rows in the model's order, and codes with the order of their columns."""
        info = place.info
        source = self._part(info, 0, info.shape[0], info.shape)
        if place.rows_of is not None:
            source = source.in_rows(place.rows_of)
        if place.restore is not None:
            source = ops.from_floats(place.restore(ops.decode(source)).reshape(shape))
        return source if place.columns_of is None else source.with_order(place.columns_of)

    def _part(self, info: GgufTensor, start: int, stop: int, shape: tuple[int, ...]) -> WeightSource:
        data = self._rows(info, start, stop, shape[0])
        # NVFP4's second scale must not be applied if the model has it as a weight of its own.
        is_scaled = f"{info.name.removesuffix('.weight')}.scale" not in self._named
        return self._source(info, data, (stop - start, *shape[1:]), start, is_scaled=is_scaled)

    def _joined(self, info: GgufTensor, head_dim: int, shape: tuple[int, ...]) -> WeightSource:
        """Return a tensor with the halves of heads apart, not their rotary pairs."""
        if shape[0] % head_dim:
            raise ModelLoadError(f"tensor {info.name!r} must have whole heads of {head_dim} rows")
        data = join_rotary_halves(self._rows(info, 0, shape[0], shape[0]), shape[0], head_dim)
        return self._source(info, data, shape, 0)

    def names(self) -> list[str]:
        """Return the names of all weights, as described in `NamedWeights.names`."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight after decoding."""
        return self._find(name).shape

    def integers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
        """Refuse a table of integers, as llama.cpp's converter writes none for these architectures."""
        raise ModelLoadError(f"{name!r}: tables of integers are not read from GGUF files")

    def parts(self, name: str) -> list[str]:
        """Return the name by which `stored` lists a weight: its own."""
        return [name]

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`, by the names of `transformers`."""
        return {name: (place.format, math.prod(place.shape)) for name, place in self._places.items()}
