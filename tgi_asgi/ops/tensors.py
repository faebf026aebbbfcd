"""Weight sources as torch tensors and back, for GPUs and for models that compute in torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.sources import WeightSource, decode

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def plain_tensor(source: WeightSource) -> Tensor:
    """Return a source of floats as stored, a view; any other format is decoded."""
    plain = _PLAIN.get(source.format)
    if plain is None:
        return torch.from_numpy(decode(source))
    return as_tensor(source.data).view(plain).view(source.shape)


def from_tensor(values: Tensor) -> WeightSource:
    """Wrap float32, float16 or bfloat16 values."""
    name = next(name for name, dtype in _PLAIN.items() if dtype is values.dtype)
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy()  # one column may have any stride
    return WeightSource(data, name, tuple(values.shape))


def as_tensor(data: npt.NDArray[np.uint8]) -> Tensor:
    """Wrap bytes without a copy. Avoids torch's warning about read-only memory, which is only read here."""
    if data.flags.writeable:
        return torch.from_numpy(data.reshape(-1))
    if data.size == 0:
        return torch.empty(0, dtype=torch.uint8)
    interface = dict(data.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    view = _Borrowed(interface, data)
    return torch.as_tensor(np.asarray(view).reshape(-1))


def float_array(rows: Tensor) -> _C.FloatArray:
    """Return a float32 tensor of the host as an array; a view, unless its last dimension has gaps."""
    return (rows if rows.stride(-1) == 1 else rows.contiguous()).numpy()


class _Borrowed:
    """Presents read-only memory as writable and keeps its owner alive."""

    def __init__(self, interface: dict[str, object], owner: object) -> None:
        self.__array_interface__ = interface
        self._owner = owner
