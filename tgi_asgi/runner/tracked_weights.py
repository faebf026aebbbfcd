"""Weights that report how much of them has been read, and finally a fingerprint."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.models.loading import WHOLE, NamedWeights, Weights
from tgi_asgi.types import Progress

_SAMPLE_BYTES = 256  # of each tensor's head and tail, hashed into the fingerprint


class TrackedWeights:
    """Weights that report reading progress and hash what was read."""

    def __init__(self, weights: Weights, progress: Progress) -> None:
        self.num_bytes, self.is_gguf = weights.num_bytes, weights.is_gguf
        self._weights = weights
        self._named = cast(NamedWeights, weights)  # used for a module's weights only, which are
        self._progress = progress
        self._done = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> ops.WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        self._progress("loading weights", self._done, self.num_bytes)
        source = self._weights.get(name, shape, part)
        self._done = min(self._done + source.data.nbytes, self.num_bytes)  # decoded data may be larger
        self._hash.update(f"{name} {source.format} {source.shape}\n".encode())
        self._hash.update(source.data[:_SAMPLE_BYTES].data)
        self._hash.update(source.data[-_SAMPLE_BYTES:].data)
        return source

    def names(self) -> list[str]:
        """Return the names of all weights, as described in `NamedWeights.names`."""
        return self._named.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape, as described in `NamedWeights.shape`."""
        return self._named.shape(name)

    def integers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
        """Return a table of integers, as described in `NamedWeights.integers`."""
        values = self._named.integers(name, shape)
        self._done = min(self._done + values.nbytes, self.num_bytes)
        self._hash.update(f"{name} {values.dtype} {values.shape}\n".encode())
        self._hash.update(values.tobytes())
        return values

    def parts(self, name: str) -> list[str]:
        """Return a weight's tensors, as described in `NamedWeights.parts`."""
        return self._named.parts(name)

    def unread(self) -> list[str]:
        """Return the names that were not read, as described in `Weights.unread`."""
        return self._weights.unread()

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`."""
        return self._weights.stored()

    def close(self) -> None:
        """Unmap the files."""
        self._weights.close()

    def fingerprint(self, others: str) -> str:
        """Return a name for what decides the output's bits: the weights, and `others`."""
        self._hash.update(others.encode())
        return f"fp_{self._hash.hexdigest()}"
