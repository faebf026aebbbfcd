"""Weights of a GGUF file under the names that a checkpoint of `transformers` has for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile, GgufTensor
from tgi_asgi.models.gguf_module import GgufModule, layer_of
from tgi_asgi.models.loading.gguf_places import Place, places_of
from tgi_asgi.models.loading.gguf_tensors import GgufTensors, without_ones
from tgi_asgi.models.loading.weights import WHOLE, check_shape
from tgi_asgi.ops import WeightSource


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
        self._places: dict[str, Place] = {}
        for stored in file.names:
            if stored in module.unused or (layer_of(stored) or 0) >= num_layers:
                self._unread.discard(stored)
                continue
            self._places |= places_of(stored, file, module, head_dim)
        self._named = {info.name for place in self._places.values() for info in place.tensors}

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def _find(self, name: str) -> Place:
        if name not in self._places:
            raise ModelLoadError(f"the GGUF file has no tensor for {name!r}, which the model needs")
        return self._places[name]

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        place = self._find(name)
        is_flat = len(shape) == 1 and math.prod(place.shape) == shape[0]  # norms of groups are matrices
        if without_ones(place.shape) != without_ones(shape) and not is_flat:
            check_shape(place.tensors[0].name, place.shape, shape)
        start, stop, _ = part.indices(shape[0] if shape else 1)
        return place.read(self._part, shape, start, stop)

    def _part(self, info: GgufTensor, start: int, stop: int, shape: tuple[int, ...]) -> WeightSource:
        data = self._rows(info, start, stop, shape[0])
        # NVFP4's second scale must not be applied if the model has it as a weight of its own.
        is_scaled = f"{info.name.removesuffix('.weight')}.scale" not in self._named
        return self._source(info, data, (stop - start, *shape[1:]), start, is_scaled=is_scaled)

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
