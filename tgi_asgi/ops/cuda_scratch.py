"""Buffers of a CUDA program that its launches share."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Buffers that launches share: each finishes with a buffer before the next writes it.

    Args:
        dtype: Dtype of activations.
        num_decoded: Number of weights in the largest matrix that is decoded.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, num_decoded: int = 0) -> None:
        self._dtype, self._device = dtype, device
        self._decoded = torch.empty(num_decoded, dtype=dtype, device=device)
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer of that name, shape and dtype (None: the activations'), initially zero."""
        key = (name, shape, dtype or self._dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=key[2], device=self._device)
        return self._buffers[key]

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        """Return the buffer for a decoded matrix, which all matrices share."""
        return self._decoded[: shape[0] * shape[1]].view(shape)
