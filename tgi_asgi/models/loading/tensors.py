"""Tensors of a checkpoint as arrays, whose dtypes are checked first; used by the readers of this folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.safetensors import Checkpoint
from tgi_asgi.formats.small_floats import decode_e4m3, decode_e8m0

FLOAT8, POWERS = "F8_E4M3", ("U8", "F8_E8M0")  # POWERS: of two, of scales
_NUMPY: dict[str, Any] = {
    "I32": np.int32, "I64": np.int64, "I8": np.int8, "U8": np.uint8, "F32": np.float32, "F16": np.float16,
}  # fmt: skip


def read_number(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """Return a tensor of one float, as an array without dimensions."""
    values = read_floats(checkpoint, name)
    if values.size != 1:
        raise ModelLoadError(f"{name!r} must be one number, but has the shape {list(values.shape)}")
    return values.reshape(())


def read_scales(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """Return scales of FP8 and FP4, which may be small floats themselves, as float32."""
    info = checkpoint.tensor(name)
    if info.dtype in POWERS:
        return decode_e8m0(checkpoint.raw(name)).reshape(info.shape)
    if info.dtype == FLOAT8:
        return decode_e4m3(checkpoint.raw(name)).reshape(info.shape)
    return read_floats(checkpoint, name)


def read_floats(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """Return a tensor of any float dtype as float32."""
    if checkpoint.tensor(name).dtype == "BF16":
        info = checkpoint.tensor(name)
        halves = checkpoint.raw(name).view(np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(info.shape)
    return read_array(checkpoint, name, "F32", "F16").astype(np.float32)


def read_array(checkpoint: Checkpoint, name: str, *dtypes: str) -> npt.NDArray[Any]:
    """Return a tensor in its shape; refuse it if it is of none of these dtypes."""
    info = checkpoint.tensor(name)
    if info.dtype not in dtypes:
        raise ModelLoadError(f"{name!r} is of dtype {info.dtype}, not {' or '.join(dict.fromkeys(dtypes))}")
    values: npt.NDArray[Any] = checkpoint.raw(name).view(_NUMPY[info.dtype]).reshape(info.shape)
    return values
