"""Reads quantised matrices of a checkpoint, each stored as several tensors, as a `WeightSource`.

A matrix is recognised as quantised by its tensors: `qweight` with `scales` (AutoAWQ, AutoGPTQ),
`weight_packed` with `weight_scale` (compressed-tensors), or a `weight` of bytes (FP8).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.quantised import (
    IntegerMatrix,
    Quantisation,
    float8_scales,
    unpack_awq,
    unpack_compressed,
    unpack_gptq,
)
from tgi_asgi.formats.safetensors import Checkpoint
from tgi_asgi.models.loading import check_shape
from tgi_asgi.models.loading.mxfp4 import stored_expert
from tgi_asgi.ops import WeightSource

_NUMPY: dict[str, Any] = {"I32": np.int32, "F32": np.float32, "F16": np.float16}
_FLOAT8 = "F8_E4M3"


def find_quantised(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether this weight is quantised in the checkpoint."""
    stem = name.removesuffix("weight")
    if stem == name:
        return False
    if name in checkpoint:
        return checkpoint.tensor(name).dtype == _FLOAT8
    return f"{stem}qweight" in checkpoint or f"{name}_packed" in checkpoint


_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WEIGHT_PARTS = ("", "_packed", "_scale", "_scale_inv", "_zero_point", "_g_idx", "_shape")
# Scales of inputs, which are quantised differently or not at all here, and of queries, keys and values, which
# only an FP8 cache uses (`kv_scales.py`).
UNUSED = (
    "*.input_scale", "*.input_zero_point", "*_proj.output_scale", "*.k_proj.k_scale", "*.v_proj.v_scale",
    "*.qkv_proj.[kv]_scale",
    "*.self_attn.[kqv]_scale", "*.self_attn.kv_scale", "*.self_attn.prob_scale",
)  # fmt: skip


def names_of(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the names of the tensors that make up a quantised weight."""
    stem = name.removesuffix("weight")
    names = [f"{stem}{part}" for part in _PARTS] + [f"{name}{part}" for part in _WEIGHT_PARTS]
    bias = f"{stem}bias"  # AutoGPTQ writes a bias of zeros if the product has none
    if bias in checkpoint and not checkpoint.raw(bias).any():
        names.append(bias)
    return [each for each in names if each in checkpoint]


def stored_format(checkpoint: Checkpoint, name: str, quantisation: Quantisation | None) -> tuple[str, int]:
    """Return a tensor's format and elements; codes that no format can hold count as the decoded type."""
    info = checkpoint.tensor(name)
    if quantisation is not None and quantisation.method == "mxfp4":
        found = stored_expert(name, math.prod(info.shape))
        if found is not None:
            return found
    if quantisation is not None and info.dtype == "I32" and _is_decoded(checkpoint, name, quantisation):
        return "F16", math.prod(info.shape) * 32 // quantisation.bits
    return info.dtype.replace(_FLOAT8, "F8_32"), math.prod(info.shape)


def _is_decoded(checkpoint: Checkpoint, name: str, quantisation: Quantisation) -> bool:
    """Return whether codes must be decoded: groups out of order, or eight bits with zero points."""
    stem, codes, _ = name.rpartition("qweight" if quantisation.method == "gptq" else "weight_packed")
    if not codes:
        return False
    groups, zeros = (f"{stem}{part}" for part in ("weight_g_idx", "weight_zero_point"))
    if quantisation.method == "gptq":
        groups, zeros = f"{stem}g_idx", f"{stem}qzeros"
    if groups in checkpoint and (np.diff(_read(checkpoint, groups, "I32").reshape(-1)) < 0).any():
        return True
    if quantisation.bits != 8 or zeros not in checkpoint:
        return False
    return bool((checkpoint.raw(zeros) + np.uint8(quantisation.zero_shift) != 128).any())


def quantised_shape(checkpoint: Checkpoint, name: str, quantisation: Quantisation) -> tuple[int, int]:
    """Return the rows and columns of a quantised weight."""
    if name in checkpoint:
        rows, columns = checkpoint.tensor(name).shape
        return rows, columns
    stem = name.removesuffix("weight")
    if f"{name}_packed" in checkpoint:
        rows, words = checkpoint.tensor(f"{name}_packed").shape
        return rows, words * 32 // quantisation.bits
    first, second = checkpoint.tensor(f"{stem}qweight").shape
    if quantisation.method == "gptq":
        return second, first * 32 // quantisation.bits
    return second * 32 // quantisation.bits, first


def read_quantised(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], quantisation: Quantisation
) -> WeightSource:
    """Read a weight [rows, columns] that `find_quantised` found.

    Raises:
        ModelLoadError: if a tensor is missing or its tensors do not fit each other.
    """
    if len(shape) != 2:
        raise ModelLoadError(f"only matrices can be quantised, not one of shape {list(shape)}")
    if name in checkpoint:
        return _read_float8(checkpoint, name, (shape[0], shape[1]), quantisation)
    matrix = _read_integers(checkpoint, name.removesuffix("weight"), shape[1], quantisation)
    check_shape(name, matrix.shape, shape)
    return _as_source(matrix)


def _read_integers(
    checkpoint: Checkpoint, stem: str, columns: int, quantisation: Quantisation
) -> IntegerMatrix:
    def words(name: str) -> npt.NDArray[np.int32]:
        return _read(checkpoint, stem + name, "I32")

    def words_or_none(name: str) -> npt.NDArray[np.int32] | None:
        return words(name) if stem + name in checkpoint else None

    if quantisation.method == "gptq":
        return unpack_gptq(
            words("qweight"), words("qzeros"), read_floats(checkpoint, f"{stem}scales"),
            words_or_none("g_idx"), quantisation.bits, quantisation.zero_shift,
        )  # fmt: skip
    if quantisation.method == "awq":
        return unpack_awq(words("qweight"), words("qzeros"), read_floats(checkpoint, f"{stem}scales"))
    return unpack_compressed(
        words("weight_packed"), read_floats(checkpoint, f"{stem}weight_scale"),
        words_or_none("weight_zero_point"), words_or_none("weight_g_idx"), columns,
    )  # fmt: skip


def _as_source(matrix: IntegerMatrix) -> WeightSource:
    """Keep the codes, with groups made contiguous, if a format can hold them; else decode them."""
    grouped = (matrix, None) if matrix.groups is None else matrix.by_group()
    if grouped is not None:
        side_by_side, order = grouped
        source = ops.integer_source(
            side_by_side.codes, side_by_side.scales, side_by_side.zeros, matrix.bits, order
        )
        if source is not None:
            return source
    return _decoded(matrix)


def _decoded(matrix: IntegerMatrix) -> WeightSource:
    """Decode to float16, as AutoGPTQ does, or to float32 if the scales require it."""
    weights = matrix.dequantise()
    with np.errstate(over="ignore"):
        halves, scales = weights.astype(np.float16), matrix.scales.astype(np.float16)
    if np.array_equal(scales, matrix.scales) and np.isfinite(halves).all():
        return WeightSource(halves.reshape(-1).view(np.uint8), "F16", matrix.shape)
    return WeightSource(weights.reshape(-1).view(np.uint8), "F32", matrix.shape)


def _read_float8(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], quantisation: Quantisation
) -> WeightSource:
    check_shape(name, checkpoint.tensor(name).shape, shape)
    codes = checkpoint.raw(name).reshape(shape)
    scale = next((s for s in (f"{name}_scale", f"{name}_scale_inv") if s in checkpoint), None)
    if scale is None:
        raise ModelLoadError("it has neither a weight_scale nor a weight_scale_inv")
    run = next((run for run in (128, 64, 32) if shape[1] % run == 0), None)
    if quantisation.block is not None:
        run = next((run for run in (128, 64, 32) if shape[1] % run == quantisation.block[1] % run == 0), None)
    if run is None:
        raise ModelLoadError(f"FP8 needs columns in multiples of 32, not {shape[1]}")
    scales = float8_scales(read_floats(checkpoint, scale), quantisation.block, shape, run)
    return ops.float8_source(codes, scales)


def read_floats(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """Return a tensor of any float dtype as float32."""
    if checkpoint.tensor(name).dtype == "BF16":
        info = checkpoint.tensor(name)
        halves = checkpoint.raw(name).view(np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(info.shape)
    return _read(checkpoint, name, "F32", "F16").astype(np.float32)


def _read(checkpoint: Checkpoint, name: str, *dtypes: str) -> npt.NDArray[Any]:
    info = checkpoint.tensor(name)
    if info.dtype not in dtypes:
        raise ModelLoadError(f"{name!r} is of dtype {info.dtype}, not {' or '.join(dtypes)}")
    values: npt.NDArray[Any] = checkpoint.raw(name).view(_NUMPY[info.dtype]).reshape(info.shape)
    return values
