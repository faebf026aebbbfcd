"""Weights of a checkpoint directory, whose names are already canonical, except for quantised matrices."""

from __future__ import annotations

import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.loading.mxfp4 import BLOCK, ExpertMatrix, find_expert, read_expert
from tgi_asgi.models.loading.quantised import read_quantised
from tgi_asgi.models.loading.stored import UNUSED, is_quantised, part_names, quantised_shape, stored_format
from tgi_asgi.models.loading.tensors import have_equal_values, read_array, read_floats
from tgi_asgi.models.loading.weights import WHOLE, check_shape, matches
from tgi_asgi.ops import WeightSource
from tgi_asgi.ops.formats import RUNS

_FORMATS = ("F32", "F16", "BF16")


class SafetensorsWeights:
    """A checkpoint's `Weights`, sharded or not, quantised or not."""

    is_gguf = False

    def __init__(
        self, directory: Path, quantisation: Quantisation | None = None, checkpoint: Checkpoint | None = None
    ) -> None:
        """Open a directory's checkpoint, or use an open one, which this then closes."""
        self._directory = directory
        self._checkpoint = Checkpoint.open(directory) if checkpoint is None else checkpoint
        self._unread = set(self._checkpoint)
        self._quantisation = quantisation
        self.num_bytes = sum(self._checkpoint.tensor(name).nbytes for name in self._checkpoint)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        # The file may hold no tensor of that name, but its parts: `qweight`, `weight_packed`.
        is_one = name in self._checkpoint or self._quantisation_of(name) is not None
        return is_one or self._expert(name) is not None

    def _quantisation_of(self, name: str) -> Quantisation | None:
        """Return how a weight is quantised; None if it is not."""
        is_one = self._quantisation is not None and is_quantised(self._checkpoint, name)
        return self._quantisation if is_one else None

    def is_quantised(self, name: str) -> bool:
        """Return whether a weight is stored quantised."""
        return self._quantisation_of(name) is not None

    def _expert(self, name: str) -> ExpertMatrix | None:
        """Return the location of an expert's matrix, if all experts are in one tensor of blocks."""
        is_packed = self._quantisation is not None and self._quantisation.method == "mxfp4"
        return find_expert(self._checkpoint, name) if is_packed else None

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`; a quantised matrix in blocks of `ops`."""
        count = shape[0] if shape else 1
        start, stop, _ = part.indices(count)
        quantisation = self._quantisation_of(name)
        if quantisation is not None:
            self._unread -= set(part_names(self._checkpoint, name))
            try:
                return read_quantised(self._checkpoint, name, shape, quantisation).rows(start, stop)
            except ModelLoadError as error:
                raise ModelLoadError(f"{self._directory}: {name!r}: {error}") from None
        expert = self._expert(name)
        if expert is not None:
            self._unread -= {expert.blocks, expert.scales}
            return read_expert(self._checkpoint, expert, shape).rows(start, stop)
        if name not in self._checkpoint:
            raise ModelLoadError(f"{self._directory}: there is no tensor {name!r}, which the model needs")
        info = self._checkpoint.tensor(name)
        self._unread.discard(name)
        if info.dtype not in _FORMATS:
            raise ModelLoadError(
                f"tensor {name!r} is of dtype {info.dtype}; supported are {', '.join(_FORMATS)}"
            )
        check_shape(name, info.shape, shape)
        rest = shape[1:] if len(shape) in (1, 2) else (math.prod(shape[1:]),)
        data = self._checkpoint.raw(name, *(info.nbytes * at // max(count, 1) for at in (start, stop)))
        return WeightSource(data, info.dtype, (stop - start, *rest))

    def floats(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a small float tensor of any shape as float32; None if it does not exist."""
        return read_floats(self._checkpoint, name) if name in self._checkpoint else None

    def integers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
        """Return a table of integers, as described in `NamedWeights.integers`."""
        self._unread.discard(name)
        check_shape(name, self._checkpoint.tensor(name).shape, shape)
        return read_array(self._checkpoint, name, "I64", "I32", "I8", "U8")

    def are_equal(self, first: str, second: str) -> bool:
        """Return whether two weights have the same values; False if one is quantised."""
        are_stored = first in self._checkpoint and second in self._checkpoint
        return are_stored and have_equal_values(self._checkpoint, first, second)

    def names(self) -> list[str]:
        """Return the names of all weights; a quantised weight has one name, not those of its parts."""
        if self._quantisation is None:
            return list(self._checkpoint)
        whole = {
            f"{name.removesuffix('qweight')}weight" for name in self._checkpoint if name.endswith(".qweight")
        }
        whole |= {
            name.removesuffix("_packed") for name in self._checkpoint if name.endswith(".weight_packed")
        }
        whole |= {name for name in self._checkpoint if is_quantised(self._checkpoint, name)}
        parts = {part for name in whole for part in part_names(self._checkpoint, name)}
        others = [name for name in self._checkpoint if name not in parts and not matches(name, UNUSED)]
        return [*whole, *others]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight after decoding."""
        quantisation = self._quantisation_of(name)
        if quantisation is not None:
            return quantised_shape(self._checkpoint, name, quantisation)
        return self._checkpoint.tensor(name).shape

    def parts(self, name: str) -> list[str]:
        """Return the names of the tensors that make up a weight, as described in `NamedWeights.parts`."""
        return [name] if self._quantisation_of(name) is None else part_names(self._checkpoint, name)

    def unread(self) -> list[str]:
        """Return the names that were not read, as described in `Weights.unread`."""
        unused = () if self._quantisation is None else UNUSED
        return sorted(name for name in self._unread if not matches(name, unused))

    def stored(self, cut: Container[str] = ()) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`.

        Args:
            cut: Names of the weights that shards would cut by columns; see `ORDERED`.
        """
        return {
            name: stored_format(self._checkpoint, name, self._quantisation, cut) for name in self._checkpoint
        }

    def block_columns(self, name: str) -> int:
        """Return how many columns must stay together; for a quantised matrix the largest run."""
        if self._expert(name) is not None:
            return BLOCK
        return 1 if self._quantisation_of(name) is None else max(RUNS)

    def close(self) -> None:
        """Unmap the files."""
        self._checkpoint.close()
