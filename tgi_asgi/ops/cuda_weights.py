"""A recorded model's weights on a CUDA device, each moved there once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceMatrix


class DeviceWeights:
    """Moves weights to a device; the same object is moved only once, until `clear`.

    Args:
        dtype: Dtype of matrices without codes.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._moved: dict[int, tuple[object, Any]] = {}  # by id: the host's object, and the device's

    def clear(self) -> None:
        """Release the host tensors that nothing else references."""
        self._moved.clear()

    def move(self, values: Tensor | Floats, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor or array on the device, in `dtype` or that of matrices."""
        kept = self._moved.get(id(values))
        if kept is None:
            tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
            moved = tensor.to(self._device, dtype or self._dtype).contiguous()
            self._moved[id(values)] = kept = (values, moved)
        found: Tensor = kept[1]
        return found

    def floats(self, values: Tensor | Floats | None) -> Tensor | None:
        """Return a tensor or array on the device in float32, or None."""
        return None if values is None else self.move(values, torch.float32)

    def matrix(self, made: DeviceMatrix) -> Tensor | CudaQuantMatrix:
        """Return a matrix on the device, as codes if it has them."""
        matrix = made.matrix
        if not isinstance(matrix, CudaQuantMatrix):
            return self.move(matrix)
        if id(matrix) not in self._moved:
            self._moved[id(matrix)] = (matrix, matrix.to(self._device))
        found: CudaQuantMatrix = self._moved[id(matrix)][1]
        return found

    def dense(self, made: DeviceMatrix) -> Tensor:
        """Return a matrix on the device as plain (decoded) weights."""
        matrix = self.matrix(made)
        return matrix.plain(self._dtype) if isinstance(matrix, CudaQuantMatrix) else matrix
