"""Recognise quantised matrices of a checkpoint by their tensors; return shapes and formats from the headers.

qweight            int32   codes, with scales and qzeros (AutoGPTQ, AutoAWQ)
weight_packed      int32   codes, with weight_scale (compressed-tensors)
weight_packed      uint8   NVFP4 with weight_global_scale, MXFP4 without
weight             E4M3    with weight_scale or weight_scale_inv
weight             int8    codes, with weight_scale (compressed-tensors) or SCB (bitsandbytes)
weight             uint8   NVFP4 with weight_scale_2 (ModelOpt), MXFP4 (Quark)
weight             any     bitsandbytes' codes of four bits in its `bnb_4bit_quant_storage`, with tables
"""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.codes import compressed_packing, width
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.small_floats import TableState
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.loading.mxfp4 import stored_expert
from tgi_asgi.models.loading.tensors import E8M0, FLOAT8, read_array
from tgi_asgi.ops.formats import RUNS

_CODES = (FLOAT8, "I8", "U8")  # dtypes of a `weight` that has scales beside it
_DECODED = "F8_32"  # the format that counts the memory of weights that are decoded and then rounded


_STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format")
_WEIGHT_PARTS = (
    "", "_packed", "_scale", "_scale_inv", "_scale_2", "_global_scale", "_zero_point", "_g_idx", "_shape",
    *(f".{table}" for table in TABLES), *_STATES,
)  # fmt: skip
# Parts of names of weights whose columns must be in order on a CPU: see `ops.Packing`.
_IN_ORDER = (
    ".experts.", "lm_head.", "embed_out.", ".gate.", ".router.", ".shared_expert_gate.", ".kv_b_proj.",
    ".in_proj_b.", ".in_proj_a.", ".in_proj_ba.",
)  # fmt: skip
# Scales of inputs, which are quantised differently or not at all here, and of queries, keys and values, which
# only an FP8 cache uses (`kv_scales.py`). compressed-tensors writes zero points beside those of attention.
UNUSED = (
    "*.input_scale", "*.input_zero_point", "*.input_global_scale", "*.activation_scale", "*.act_scale",
    "*.input_scale_ub", "*_proj.output_scale", "*.k_proj.k_scale", "*.v_proj.v_scale",
    "*.qkv_proj.[kv]_scale",
    "*.self_attn.[kqv]_scale", "*.self_attn.[kqv]_zero_point", "*.self_attn.kv_scale",
    "*.self_attn.prob_scale",
)  # fmt: skip


def is_quantised(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether this weight is quantised in the checkpoint."""
    stem = name.removesuffix("weight")
    if stem == name:
        return False
    if name in checkpoint:
        return checkpoint.tensor(name).dtype in _CODES or state_name(checkpoint, name) is not None
    return f"{stem}qweight" in checkpoint or f"{name}_packed" in checkpoint


def part_names(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the names of the tensors that make up a quantised weight."""
    stem = name.removesuffix("weight")
    names = [f"{stem}{part}" for part in _PARTS] + [f"{name}{part}" for part in _WEIGHT_PARTS]
    bias = f"{stem}bias"  # AutoGPTQ writes a bias of zeros if the product has none
    if bias in checkpoint and not checkpoint.raw(bias).any():
        names.append(bias)
    return [each for each in names if each in checkpoint]


def stored_format(
    checkpoint: Checkpoint, name: str, quantisation: Quantisation | None, cut: Container[str] = ()
) -> tuple[str, int]:
    """Return a tensor's format and elements; codes that no format can hold count as the decoded type.

    Args:
        cut: Names of the weights that shards would cut by columns; see `ORDERED`.
    """
    info = checkpoint.tensor(name)
    elements = math.prod(info.shape)
    if quantisation is None:
        return info.dtype, elements
    if quantisation.method == "mxfp4":
        found = stored_expert(name, elements)
        if found is not None:
            return found
    weight = _weight_of(name)
    if info.dtype == "I32" and weight is not None:
        return _stored_integers(checkpoint, weight, quantisation, is_cut=weight in cut)
    if weight is None or not is_quantised(checkpoint, weight):
        return info.dtype, 0 if info.dtype in (FLOAT8, *E8M0) else elements  # scales are in the blocks
    if state_name(checkpoint, weight) is not None:
        return _DECODED, 2 * info.nbytes
    if info.dtype == "I8":
        return _stored_integers(checkpoint, weight, quantisation, is_cut=weight in cut)
    if info.dtype == "U8":
        return _nibbles_format(checkpoint, weight, info.shape), 2 * elements
    return _DECODED if info.dtype == FLOAT8 else info.dtype, elements


def _nibbles_format(checkpoint: Checkpoint, weight: str, packed: tuple[int, ...]) -> str:
    """Return the format of four-bit floats; NVFP4 with scales beyond float16 is decoded all the same."""
    if is_mxfp4(checkpoint, weight):
        return "MXFP4"
    scales = f"{weight}_scale"
    shape = checkpoint.tensor(scales).shape if scales in checkpoint else ()
    if len(packed) != 2 or len(shape) != 2 or shape[1] == 0:
        return _DECODED  # refused when it is read
    columns = 2 * packed[1]
    return "FP4_16" if are_fp4_blocks(columns, columns // shape[1]) else _DECODED


def are_fp4_blocks(columns: int, run: int) -> bool:
    """Return whether rows are whole blocks of FP4_16, if as many columns share a scale."""
    return columns % 32 == 0 and run % 16 == 0


def _weight_of(name: str) -> str | None:
    """Return the weight that a tensor of codes belongs to; None for any other tensor."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.weight" if last in ("weight", "qweight", "weight_packed") else None


def _stored_integers(
    checkpoint: Checkpoint, weight: str, quantisation: Quantisation, *, is_cut: bool
) -> tuple[str, int]:
    rows, columns = quantised_shape(checkpoint, weight, quantisation)
    bits, groups = _bits(checkpoint, weight, columns, quantisation), _given_groups(checkpoint, weight)
    has_order = groups is not None and bool((np.diff(groups) < 0).any())
    must_be_decoded = (
        (has_order and any(part in weight for part in _IN_ORDER))
        or not _are_blocks(checkpoint, weight, groups, columns, quantisation)
        or (bits == 8 and _has_zeros(checkpoint, weight, quantisation))
    )
    if must_be_decoded:
        return "F16", rows * columns
    if has_order and is_cut:
        return "ordered_8" if bits > 4 else "ordered_4", rows * columns
    if weight in checkpoint:
        return "Q8_0", rows * columns
    return "I32", rows * columns // (4 if bits > 4 else 8)  # words; scales and zero points count beside them


def _bits(checkpoint: Checkpoint, weight: str, columns: int, quantisation: Quantisation) -> int:
    if quantisation.method == "awq":
        return 4
    packed, stem = f"{weight}_packed", weight.removesuffix("weight")
    if weight in checkpoint:
        return 8
    if packed in checkpoint:
        return compressed_packing(checkpoint.tensor(packed).shape[-1], columns, quantisation.layout)[0]
    return width(checkpoint.tensor(f"{stem}qweight").shape[0], columns)


def _given_groups(checkpoint: Checkpoint, weight: str) -> npt.NDArray[np.int64] | None:
    """Return the group of each column; None if the checkpoint leaves it to the order of columns."""
    for name in (f"{weight.removesuffix('weight')}g_idx", f"{weight}_g_idx"):
        if name in checkpoint:
            found = read_array(checkpoint, name, "I32", "I64").reshape(-1)
            return found if (found != -1).any() else None
    return None


def _are_blocks(
    checkpoint: Checkpoint,
    weight: str,
    groups: npt.NDArray[np.int64] | None,
    columns: int,
    quantisation: Quantisation,
) -> bool:
    """Return whether all groups have the same number of whole blocks of columns, so that codes stay codes."""
    num_groups = _num_groups(checkpoint, weight)
    if groups is not None:
        _, counts = np.unique(groups, return_counts=True)
        size = int(counts[0])
        return len(counts) == num_groups and bool((counts == size).all()) and size % min(RUNS) == 0
    try:
        is_even = quantisation.layout.groups(columns, num_groups) is None
    except ModelLoadError as error:
        raise ModelLoadError(f"{weight!r}: {error}") from None
    return is_even and columns // num_groups % min(RUNS) == 0


def _num_groups(checkpoint: Checkpoint, weight: str) -> int:
    """Return the number of scales of a row; 1 if there are none, which reading refuses."""
    for name, axis in ((f"{weight.removesuffix('weight')}scales", 0), (f"{weight}_scale", 1)):
        if name in checkpoint:
            shape = checkpoint.tensor(name).shape
            return max(shape[axis], 1) if len(shape) == 2 else 1
    return 1


def _has_zeros(checkpoint: Checkpoint, weight: str, quantisation: Quantisation) -> bool:
    """Return whether codes of eight bits have zero points that are not half the range."""
    name, shift = f"{weight}_zero_point", 0
    if quantisation.method == "gptq":
        name, shift = f"{weight.removesuffix('weight')}qzeros", quantisation.layout.shift
    middle = 0 if weight in checkpoint else 128  # bytes are signed, words are not
    return name in checkpoint and bool((checkpoint.raw(name) + np.uint8(shift) != middle).any())


def quantised_shape(checkpoint: Checkpoint, name: str, quantisation: Quantisation) -> tuple[int, int]:
    """Return the rows and columns of a quantised weight."""
    stem, packed, shape = name.removesuffix("weight"), f"{name}_packed", f"{name}_shape"
    if state_name(checkpoint, name) is not None:
        return read_state(checkpoint, name).shape
    if name in checkpoint or packed in checkpoint:
        info = checkpoint.tensor(name if name in checkpoint else packed)
        rows, words = _pair(info.name, info.shape)
        if info.dtype == "I32" and shape in checkpoint:
            rows, words = _read_shape(checkpoint, shape)
        elif info.dtype == "I32":
            words = words * 32 // quantisation.bits
        return rows, words * 2 if info.dtype == "U8" else words
    first, second = _pair(f"{stem}qweight", checkpoint.tensor(f"{stem}qweight").shape)
    if quantisation.method != "gptq":
        return second * 8, first
    groups = f"{stem}g_idx"
    if groups in checkpoint:
        return second, math.prod(checkpoint.tensor(groups).shape)
    return second, first * 32 // quantisation.bits


def _pair(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ModelLoadError(f"only matrices can be quantised, but {name!r} has the shape {list(shape)}")
    return shape[0], shape[1]


def _read_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Return compressed-tensors' `weight_shape`."""
    values = read_array(checkpoint, name, "I64", "I32")
    if values.shape != (2,) or (values <= 0).any() or (values >= 1 << 31).any():
        raise ModelLoadError(f"{name!r} must be rows and columns, got {str(values.tolist())[:100]}")
    return int(values[0]), int(values[1])


def is_mxfp4(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether codes of four bits have a power of two per 32 columns."""
    scale = f"{name}_scale"
    codes = name if name in checkpoint else f"{name}_packed"
    if scale not in checkpoint or checkpoint.tensor(scale).dtype not in E8M0:
        return False
    packed, scales = checkpoint.tensor(codes).shape, checkpoint.tensor(scale).shape
    return len(packed) == len(scales) == 2 and packed[1] == 16 * scales[1]


def state_name(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the name of the tensor that describes bitsandbytes' codes of four bits; None for others."""
    return next((name + state for state in _STATES if name + state in checkpoint), None)


def read_state(checkpoint: Checkpoint, name: str) -> TableState:
    """Return the description of bitsandbytes' codes of four bits."""
    found = state_name(checkpoint, name)
    assert found is not None
    return TableState.from_json(checkpoint.raw(found).tobytes())
