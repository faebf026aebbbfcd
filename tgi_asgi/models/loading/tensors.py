"""Tensors of a checkpoint as arrays, whose dtypes are checked first; used by the readers of this folder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.safetensors import SafetensorsFile
from tgi_asgi.formats.small_floats import decode_e4m3, decode_e8m0
from tgi_asgi.formats.weight_files import Checkpoint

FLOAT8 = "F8_E4M3"
E8M0 = ("U8", "F8_E8M0")  # the dtypes of scales that are powers of two
_NUMPY: dict[str, Any] = {
    "I32": np.int32, "I64": np.int64, "I8": np.int8, "U8": np.uint8, "F32": np.float32, "F16": np.float16,
}  # fmt: skip
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PIECE = 1 << 20  # numbers that are compared at a time


def read_number(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """Return a tensor of one float, as an array without dimensions.

    Raises:
        ModelLoadError: if it has another number of elements.
    """
    values = read_floats(checkpoint, name)
    if values.size != 1:
        raise ModelLoadError(f"{name!r} must be one number, but has the shape {list(values.shape)}")
    return values.reshape(())


def read_scales(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """Return scales of FP8 and FP4, which may be small floats themselves, as float32."""
    info = checkpoint.tensor(name)
    if info.dtype in E8M0:
        return decode_e8m0(checkpoint.raw(name)).reshape(info.shape)
    if info.dtype == FLOAT8:
        return decode_e4m3(checkpoint.raw(name)).reshape(info.shape)
    return read_floats(checkpoint, name)


def read_floats(checkpoint: Checkpoint | SafetensorsFile, name: str) -> npt.NDArray[np.float32]:
    """Return a tensor of any float dtype as float32."""
    if checkpoint.tensor(name).dtype == "BF16":
        info = checkpoint.tensor(name)
        return _widened(checkpoint.raw(name), "BF16").reshape(info.shape)
    return read_array(checkpoint, name, "F32", "F16").astype(np.float32)


def have_equal_values(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Return whether two tensors of floats are equal; they are compared in the files, a piece at a time."""
    one, two = checkpoint.tensor(first), checkpoint.tensor(second)
    if one.shape != two.shape or not {one.dtype, two.dtype} <= _FLOAT_BYTES.keys():
        return False
    these, those = checkpoint.raw(first), checkpoint.raw(second)

    def piece(raw: npt.NDArray[np.uint8], dtype: str, start: int) -> npt.NDArray[Any]:
        width = _FLOAT_BYTES[dtype]
        part = raw[start * width : (start + _PIECE) * width]
        return part if one.dtype == two.dtype else _widened(part, dtype)

    return all(
        np.array_equal(piece(these, one.dtype, start), piece(those, two.dtype, start))
        for start in range(0, math.prod(one.shape), _PIECE)
    )


def _widened(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    values: npt.NDArray[np.float32] = raw.view(_NUMPY[dtype]).astype(np.float32)
    return values


def read_array(checkpoint: Checkpoint | SafetensorsFile, name: str, *dtypes: str) -> npt.NDArray[Any]:
    """Return a tensor in its shape; refuse it if it is of none of these dtypes."""
    info = checkpoint.tensor(name)
    if info.dtype not in dtypes:
        raise ModelLoadError(f"{name!r} is of dtype {info.dtype}, not {' or '.join(dtypes)}")
    values: npt.NDArray[Any] = checkpoint.raw(name).view(_NUMPY[info.dtype]).reshape(info.shape)
    return values
