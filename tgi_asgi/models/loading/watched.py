"""Weights that tell a watch what is read of them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tgi_asgi.models.loading.weights import WHOLE, NamedWeights, Weights
from tgi_asgi.ops import WeightSource


class Watch(Protocol):
    """Follows the reading of a model's weights."""

    def begin(self) -> None:
        """Take note that a tensor is about to be read; what this raises ends the loading."""

    def tensor(self, name: str, source: WeightSource) -> None:
        """Take note of a tensor that has been read."""

    def integers(self, name: str, values: npt.NDArray[np.integer[Any]]) -> None:
        """Take note of a table of integers that has been read."""


def watched(weights: Weights, watch: Watch | None) -> Weights:
    """Return the weights, watched if there is a watch."""
    return weights if watch is None else _Watched(weights, watch)


def watched_names(weights: NamedWeights, watch: Watch | None) -> NamedWeights:
    """Return the weights of a module, watched if there is a watch."""
    return weights if watch is None else _WatchedNames(weights, watch)


class _Watched:
    """Watched `Weights`."""

    def __init__(self, weights: Weights, watch: Watch) -> None:
        self.num_bytes, self.is_gguf = weights.num_bytes, weights.is_gguf
        self._weights, self._watch = weights, watch

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        self._watch.begin()
        source = self._weights.get(name, shape, part)
        self._watch.tensor(name, source)
        return source

    def unread(self) -> list[str]:
        """Return the names that were not read, as described in `Weights.unread`."""
        return self._weights.unread()

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`."""
        return self._weights.stored()

    def close(self) -> None:
        """Unmap the files."""
        self._weights.close()


class _WatchedNames(_Watched):
    """Watched `NamedWeights`."""

    def __init__(self, weights: NamedWeights, watch: Watch) -> None:
        super().__init__(weights, watch)
        self._named = weights

    def names(self) -> list[str]:
        """Return the names of all weights, as described in `NamedWeights.names`."""
        return self._named.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape, as described in `NamedWeights.shape`."""
        return self._named.shape(name)

    def integers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
        """Return a table of integers, as described in `NamedWeights.integers`."""
        values = self._named.integers(name, shape)
        self._watch.integers(name, values)
        return values

    def parts(self, name: str) -> list[str]:
        """Return a weight's tensors, as described in `NamedWeights.parts`."""
        return self._named.parts(name)
