"""Read quantised matrices of a checkpoint, each stored as several tensors, as a `WeightSource`.

`stored.py` lists the kinds of tensors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.codes import (
    IntegerMatrix,
    unpack_awq,
    unpack_bytes,
    unpack_compressed,
    unpack_gptq,
)
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.small_floats import (
    decode_e4m3,
    decode_fp4,
    decode_table,
    float8_scales,
    fp4_blocks,
    fp4_run,
    holds_fp4_scales,
    mxfp4_blocks,
)
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.loading.stored import TABLES, are_fp4_blocks, is_mxfp4, read_state, state_name
from tgi_asgi.models.loading.tensors import FLOAT8, read_array, read_floats, read_number, read_scales
from tgi_asgi.models.loading.weights import check_shape
from tgi_asgi.ops import WeightSource


def read_quantised(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], quantisation: Quantisation
) -> WeightSource:
    """Read a weight [rows, columns] for which `is_quantised` is true.

    Raises:
        ModelLoadError: if a tensor is missing or its tensors do not fit each other.
    """
    if len(shape) != 2:
        raise ModelLoadError(f"only matrices can be quantised, not one of shape {list(shape)}")
    if state_name(checkpoint, name) is not None:
        return _read_table(checkpoint, name, (shape[0], shape[1]))
    codes = name if name in checkpoint else f"{name}_packed"
    dtype = checkpoint.tensor(codes).dtype if codes in checkpoint else ""
    if dtype == "U8":
        return _read_nibbles(checkpoint, name, codes, (shape[0], shape[1]))
    if codes == name and dtype == FLOAT8:
        return _read_float8(checkpoint, name, (shape[0], shape[1]), quantisation)
    if codes == name:
        return _read_bytes(checkpoint, name, (shape[0], shape[1]), quantisation)
    matrix = _read_integers(checkpoint, name.removesuffix("weight"), shape[1], quantisation)
    check_shape(name, matrix.shape, shape)
    return _as_source(matrix)


def _read_integers(
    checkpoint: Checkpoint, stem: str, columns: int, quantisation: Quantisation
) -> IntegerMatrix:
    def words(name: str) -> npt.NDArray[np.int32]:
        return read_array(checkpoint, stem + name, "I32")

    def words_or_none(name: str) -> npt.NDArray[np.int32] | None:
        return words(name) if stem + name in checkpoint else None

    if quantisation.method == "gptq":
        return unpack_gptq(
            words("qweight"), words("qzeros"), read_floats(checkpoint, f"{stem}scales"),
            words_or_none("g_idx"), columns, quantisation.layout,
        )  # fmt: skip
    if quantisation.method == "awq":
        scales = read_floats(checkpoint, f"{stem}scales")
        return unpack_awq(words("qweight"), words("qzeros"), scales, quantisation.layout)
    _check_zeros(checkpoint, f"{stem}weight_zero_point", quantisation)
    return unpack_compressed(
        words("weight_packed"), read_floats(checkpoint, f"{stem}weight_scale"),
        words_or_none("weight_zero_point"), words_or_none("weight_g_idx"), columns, quantisation.layout,
    )  # fmt: skip


def _read_bytes(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], quantisation: Quantisation
) -> WeightSource:
    """Read codes of one byte each; bitsandbytes' scales become float16 (within one part in 2,048)."""
    check_shape(name, checkpoint.tensor(name).shape, shape)
    codes = read_array(checkpoint, name, "I8")
    largest, scale, zeros = f"{name.removesuffix('weight')}SCB", f"{name}_scale", f"{name}_zero_point"
    if largest in checkpoint:
        _check_layout(checkpoint, f"{name}_format")
        halves = (read_floats(checkpoint, largest) / 127).astype(np.float16)
        return _as_source(unpack_bytes(codes, halves.astype(np.float32), None, None, quantisation.layout))
    if scale not in checkpoint:
        raise ModelLoadError("it has neither a weight_scale nor bitsandbytes' SCB")
    _check_zeros(checkpoint, zeros, quantisation)
    points = read_array(checkpoint, zeros, "I8") if zeros in checkpoint else None
    groups = read_array(checkpoint, f"{name}_g_idx", "I32") if f"{name}_g_idx" in checkpoint else None
    return _as_source(
        unpack_bytes(codes, read_floats(checkpoint, scale), points, groups, quantisation.layout)
    )


def _check_layout(checkpoint: Checkpoint, name: str) -> None:
    """Refuse bitsandbytes' layouts in tiles, which its versions before 0.45 could also save."""
    if name in checkpoint and read_array(checkpoint, name, "U8").any():
        raise ModelLoadError(f"{name!r} says that codes are in tiles of a GPU, not in rows: save it anew")


def _check_zeros(checkpoint: Checkpoint, name: str, quantisation: Quantisation) -> None:
    """Refuse a matrix without its zero points, which half the range would replace."""
    if quantisation.has_zeros and name not in checkpoint:
        raise ModelLoadError(f"there is no tensor {name!r}, but `symmetric` is false")


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
    """Decode to float16, as AutoGPTQ does, or to float32, which may be rounded, if the scales require it."""
    weights = matrix.dequantise()
    with np.errstate(over="ignore"):
        if np.array_equal(matrix.scales.astype(np.float16), matrix.scales):
            halves = weights.astype(np.float16)
            if np.isfinite(halves).all():
                return WeightSource(halves.reshape(-1).view(np.uint8), "F16", matrix.shape)
    return ops.decoded_source(weights)


def _read_float8(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], quantisation: Quantisation
) -> WeightSource:
    check_shape(name, checkpoint.tensor(name).shape, shape)
    codes, columns = checkpoint.raw(name).reshape(shape), shape[1]
    scale = next((s for s in (f"{name}_scale", f"{name}_scale_inv") if s in checkpoint), None)
    if scale is None:
        raise ModelLoadError("it has neither a weight_scale nor a weight_scale_inv")
    order = f"{name}_g_idx"
    if order in checkpoint and (read_array(checkpoint, order, "I32") != -1).any():
        raise ModelLoadError(f"FP8 with groups of columns in another order ({order!r}) is not supported")
    grid = float8_scales(read_scales(checkpoint, scale), quantisation.block, shape)
    run = next((run for run in (128, 64, 32) if columns % run == 0 == grid.run % run), None)
    if run is not None:
        return ops.float8_source(codes, grid.by_run(run, columns))
    with np.errstate(over="ignore", invalid="ignore"):
        return ops.decoded_source(decode_e4m3(codes) * grid.spread(columns))


def _read_nibbles(checkpoint: Checkpoint, name: str, codes: str, shape: tuple[int, int]) -> WeightSource:
    """Read codes of four bits, two to a byte."""
    if shape[1] % 2:
        raise ModelLoadError(f"a matrix of {shape[1]} columns has no whole bytes of two codes each")
    check_shape(codes, checkpoint.tensor(codes).shape, (shape[0], shape[1] // 2))
    packed, scale = read_array(checkpoint, codes, "U8"), f"{name}_scale"
    if is_mxfp4(checkpoint, name):
        if shape[1] % 32:
            raise ModelLoadError(f"MXFP4 has blocks of 32 columns, which do not divide {shape[1]}")
        check_shape(scale, checkpoint.tensor(scale).shape, (shape[0], shape[1] // 32))
        exponents = checkpoint.raw(scale).reshape(shape[0], -1)
        blocks = mxfp4_blocks(packed.reshape(shape[0], -1, 16), exponents)
        return WeightSource(blocks.reshape(-1), "MXFP4", shape)
    scales = read_scales(checkpoint, scale)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if f"{name}_scale_2" in checkpoint:
            scales = scales * read_number(checkpoint, f"{name}_scale_2")
        elif f"{name}_global_scale" in checkpoint:
            scales = scales / read_number(checkpoint, f"{name}_global_scale")
        else:
            raise ModelLoadError("it has neither a weight_global_scale nor a weight_scale_2")
    run = fp4_run(packed, scales)
    if are_fp4_blocks(shape[1], run) and holds_fp4_scales(scales):
        blocks = fp4_blocks(packed, np.repeat(scales, run // 16, axis=1))
        return WeightSource(blocks.reshape(-1), "FP4_16", shape)
    return ops.decoded_source(decode_fp4(packed, scales))


def _read_table(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> WeightSource:
    """Read bitsandbytes' NF4 or FP4."""
    state = read_state(checkpoint, name)
    check_shape(name, state.shape, shape)
    # Scales are floats, or with a nested block codes of floats.
    scales = "U8" if state.nested_block else "F32"
    parts = {
        table: read_array(checkpoint, f"{name}.{table}", scales if table == "absmax" else "F32")
        for table in (TABLES if state.nested_block else TABLES[:2])
    }
    return ops.decoded_source(decode_table(checkpoint.raw(name), state, parts))
