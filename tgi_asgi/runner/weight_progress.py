"""Reports how much of a model's weights has been read, and finally a fingerprint of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.types import Progress

_SAMPLE_BYTES = 256  # of each tensor's head and tail, hashed into the fingerprint


class WeightProgress:
    """A `Watch` that reports progress and hashes what was read.

    Args:
        num_bytes: Of all weights, as stored.
    """

    def __init__(self, num_bytes: int, progress: Progress) -> None:
        self._num_bytes, self._progress = num_bytes, progress
        self._done = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def begin(self) -> None:
        """Report what has been read so far."""
        self._progress("loading weights", self._done, self._num_bytes)

    def tensor(self, name: str, source: ops.WeightSource) -> None:
        """Count a tensor, and hash a sample of it."""
        self._count(source.data.nbytes)
        self._hash.update(f"{name} {source.format} {source.shape}\n".encode())
        self._hash.update(source.data[:_SAMPLE_BYTES].data)
        self._hash.update(source.data[-_SAMPLE_BYTES:].data)

    def integers(self, name: str, values: npt.NDArray[np.integer[Any]]) -> None:
        """Count a table, and hash all of it."""
        self._count(values.nbytes)
        self._hash.update(f"{name} {values.dtype} {values.shape}\n".encode())
        self._hash.update(values.tobytes())

    def end(self) -> None:
        """Report that everything has been read."""
        self._progress("loading weights", self._num_bytes, self._num_bytes)

    def fingerprint(self, others: str) -> str:
        """Return a name for what decides the output's bits: the weights, and `others`."""
        self._hash.update(others.encode())
        return f"fp_{self._hash.hexdigest()}"

    def _count(self, num_bytes: int) -> None:
        self._done = min(self._done + num_bytes, self._num_bytes)  # decoded data may be larger
