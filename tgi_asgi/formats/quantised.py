"""Read `quantization_config` of a checkpoint: whether its matrices can be read, and what they do not show.

The tensors' names and dtypes show most of a layout (`models/loading/quantised.py`), also where layers differ;
the configuration says what they leave open, and refuses what would be computed wrongly. Knows neither torch
nor files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.codes import GPTQ_BITS, Layout

_COMPRESSED_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
_MIXED = "mixed-precision"  # of compressed-tensors: each group of layers has one of the formats
_DENSE = "dense"  # of compressed-tensors: nothing is quantised, except perhaps the cache
_OFFLINE = ("weight_input", "weight_output")  # where transforms are part of the stored weights
_BLOCK = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)  # as older versions of compressed-tensors wrote it
# ModelOpt's algorithms, with the rows and columns per FP8 scale of those that have blocks.
_MODELOPT: dict[str, tuple[int, int] | None] = {
    "FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None, "FP8_PB_WO": (128, 128), "MXFP8": None, "MXFP4": None,
    "NVFP4": None, "W4A16_NVFP4": None, "W4A8_NVFP4_FP8": None, "W4A8_MXFP4_FP8": None,
}  # fmt: skip
# Layouts of integers of AutoRound's packing formats; None: small floats, as compressed-tensors has them.
_AUTO_ROUND: dict[str, str | None] = {
    "": "gptq_v2", "gptqmodel": "gptq_v2", "auto_gptq": "gptq", "auto_awq": "awq", "llm_compressor": None,
    "fp8_static": None, "fp8": None,
}  # fmt: skip
_METHODS = (
    "awq, gptq, auto-round, fp8, fbgemm_fp8, mxfp8, modelopt, quark, mxfp4, bitsandbytes and "
    "compressed-tensors"
)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's matrices are quantised; the tensors' names show which matrices are.

    Raises:
        ModelLoadError: if a method, or an option of one, is not supported.
    """

    method: str  # gptq and awq decide how `qweight` is packed, mxfp4 where experts are; others by their name
    bits: int = 4  # GPTQ: of codes whose columns are unknown
    layout: Layout = field(default_factory=Layout)  # of integers
    block: tuple[int, int] | None = None  # FP8: rows and columns per scale; None: a whole row, or all
    has_zeros: bool = False  # compressed-tensors: whether all integers have zero points

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Quantisation | None:
        """Read a `config.json`; return None if it has no quantisation."""
        options = config.get("quantization_config")
        if options is None:
            return None
        check(isinstance(options, dict), "`quantization_config` must be an object")
        method = str(options.get("quant_method") or options.get("method") or "").lower()
        if not method and (options.get("load_in_4bit") or options.get("load_in_8bit")):
            method = "bitsandbytes"  # whose files of 2023 name no method
        _refuse_rotations(options)
        if method == "gptq":
            return cls._gptq(options)
        if method == "awq":
            return cls._awq(options)
        if method in ("auto-round", "intel/auto-round"):
            return cls._auto_round(options)
        if method in ("fp8", "fbgemm_fp8", "mxfp8"):
            return cls("fp8", block=_read_block(options.get("weight_block_size"), "weight_block_size"))
        if method == "modelopt":
            return cls("modelopt", block=_modelopt_block(options))
        if method == "quark":
            _check_quark(options)
            return cls("quark")
        if method == "compressed-tensors":
            return cls._compressed(options)
        check(
            method in ("mxfp4", "bitsandbytes"),
            f"checkpoints quantised by {method or 'an unnamed method'} are not supported; supported are "
            f"{_METHODS}: take one of these, the original, or a GGUF file",
        )
        return cls(method)

    @classmethod
    def _gptq(cls, options: Mapping[str, Any]) -> Quantisation:
        bits = options.get("bits")
        layout = options.get("checkpoint_format") or options.get("format") or "gptq"
        if options.get("is_marlin_format"):
            layout = "marlin"  # as AutoGPTQ 0.7 said it
        check(
            type(bits) is int and bits in GPTQ_BITS,
            f"GPTQ of {bits!r} bits is not supported, only of {', '.join(map(str, GPTQ_BITS))}",
        )
        check(
            layout in ("gptq", "gptq_v2"), f"GPTQ of checkpoint_format {layout!r} is not supported, only gptq"
        )
        shift = 1 if layout == "gptq" else 0
        borrows = "gptqmodel" in str(options.get("meta")).lower()
        assert isinstance(bits, int)
        return cls("gptq", bits, Layout(shift, borrows, _group_size(options)))

    @classmethod
    def _awq(cls, options: Mapping[str, Any]) -> Quantisation:
        bits = options.get("bits", options.get("w_bit", 4))
        version = str(options.get("version") or options.get("format") or "gemm").lower()
        check(bits == 4, f"AWQ of {bits!r} bits is not supported, only of 4")
        check(
            version == "gemm" and str(options.get("backend", "")) != "llm-awq",
            f"AWQ of version {version!r} is not supported, only gemm",
        )
        return cls("awq", layout=Layout(group=_group_size(options, "q_group_size")))

    @classmethod
    def _auto_round(cls, options: Mapping[str, Any]) -> Quantisation:
        """Read AutoRound's own method; its files are packed like others'."""
        packing = str(options.get("packing_format", ""))
        kind = packing.removeprefix("auto_round").removeprefix(":")
        check(
            kind in _AUTO_ROUND and packing.startswith("auto_round"),
            f"AutoRound's packing_format {packing!r} is not supported; supported are auto_round with "
            f"{', '.join(filter(None, _AUTO_ROUND))} after a colon, or nothing",
        )
        layout = _AUTO_ROUND[kind]
        if layout == "awq":
            return cls._awq({**options, "version": "gemm"})
        if layout is not None:
            return cls._gptq({**options, "checkpoint_format": layout})
        return cls("auto-round", block=_read_block(options.get("weight_block_size"), "weight_block_size"))

    @classmethod
    def _compressed(cls, options: Mapping[str, Any]) -> Quantisation:
        groups = _objects(options.get("config_groups"))
        weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
        named = options.get("format")
        formats = {str(named)} if named != _MIXED else {str(group.get("format")) for group in groups}
        if formats == {_DENSE} and not weights:
            formats = set()
        for layout in sorted(formats):
            check(
                layout in _COMPRESSED_FORMATS,
                f"compressed-tensors of format {layout!r} are not supported; supported are "
                f"{', '.join(_COMPRESSED_FORMATS)}",
            )
        sparsity = options.get("sparsity_config")
        sparse = sparsity.get("format", _DENSE) if isinstance(sparsity, dict) else _DENSE
        check(
            sparse == _DENSE,
            f"compressed-tensors with zeros left out ({str(sparse)[:100]}) are not supported: take a "
            "checkpoint that is only quantised",
        )
        blocks = {_read_block(each.get("block_structure"), "block_structure") for each in weights} - {None}
        check(len(blocks) <= 1, f"compressed-tensors with several block sizes: {blocks}")
        sizes = {_group_size(each) for each in weights} - {None}
        widths = {_width(each) for each in weights if each.get("type") != "float"}
        return cls(
            "compressed-tensors",
            layout=Layout(
                group=sizes.pop() if len(sizes) == 1 else None,
                bits=widths.pop() if len(widths) == 1 else None,
            ),
            block=blocks.pop() if blocks else None,
            has_zeros=bool(weights) and all(each.get("symmetric") is False for each in weights),
        )


def _refuse_rotations(options: Mapping[str, Any]) -> None:
    """Refuse models whose activations are rotated while they run, because nothing here would do so."""
    for key in ("rotation", "rotation_config", "hadamard_config", "spinquant_config", "transform_config"):
        value = options.get(key)
        is_offline = key == "transform_config" and all(place in _OFFLINE for place in _places(value))
        check(
            not value or is_offline,
            f"`quantization_config` has a `{key}`: activations would have to be rotated, which is not "
            "supported",
        )


def _places(transforms: Any) -> Iterator[Any]:
    """Return where compressed-tensors' transforms apply; None for what is not one."""
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    for group in _objects(groups):
        applied = group.get("apply")
        for each in applied if isinstance(applied, list) else [None]:
            yield each.get("location") if isinstance(each, dict) else None


def _objects(groups: Any) -> list[dict[str, Any]]:
    """Return the objects among an object's values."""
    return [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []


def _modelopt_block(options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Check ModelOpt's algorithms, of all layers or of each; return the block of FP8 scales."""
    algorithm = options.get("quant_algo")
    if algorithm is None and (options.get("kv_cache_quant_algo") or options.get("kv_cache_scheme")):
        return None  # only the cache is quantised
    found = [algorithm]
    if algorithm == "MIXED_PRECISION":
        found = [layer.get("quant_algo") for layer in _objects(options.get("quantized_layers"))]
    names = {str(each)[:100].upper() for each in found}  # some are in lower case: fp8_pb_wo, mxfp4
    for each in sorted(names):
        check(
            each in _MODELOPT,
            f"ModelOpt of quant_algo {each!r} is not supported; supported are {', '.join(_MODELOPT)}",
        )
    return next((block for each in names if (block := _MODELOPT[each]) is not None), None)


def _check_quark(options: Mapping[str, Any]) -> None:
    """Refuse what Quark stores otherwise than as FP8 or MXFP4, and inputs that are rotated while it runs."""
    algorithms = options.get("algo_config")
    for each in algorithms if isinstance(algorithms, list) else [algorithms]:
        for key in ("online_r1_rotation", "r4"):  # R3 cancels out: queries and keys are rotated alike
            check(
                not (isinstance(each, dict) and each.get(key)),
                f"Quark's rotation has `{key}`: activations would have to be rotated, which is not supported",
            )
    layers = [options.get("global_quant_config"), *_objects(options.get("layer_quant_config"))]
    layers += _objects(options.get("layer_type_quant_config"))
    for layer in layers:
        weight = layer.get("weight") if isinstance(layer, dict) else None
        for spec in weight if isinstance(weight, list) else [weight]:
            if not isinstance(spec, dict):
                continue
            dtype, scales = spec.get("dtype"), spec.get("scale_format")
            check(
                dtype == "fp8_e4m3" or (dtype == "fp4" and scales == "e8m0" and spec.get("group_size") == 32),
                f"Quark's weights of dtype {dtype!r} are not supported; supported are fp8_e4m3 and MXFP4 "
                "(fp4 in groups of 32)",
            )


def _group_size(options: Mapping[str, Any], other: str = "") -> int | None:
    """Return the columns per group; None if they are one group (-1), or neither key gives it."""
    size = options.get("group_size", options.get(other))
    return size if type(size) is int and size > 0 else None


def _width(options: Mapping[str, Any]) -> int | None:
    """Return the bits of each code; None if they are not given."""
    bits = options.get("num_bits")
    return bits if type(bits) is int and 2 <= bits <= 8 else None


def _read_block(value: Any, key: str) -> tuple[int, int] | None:
    """Return the rows and columns per FP8 scale that a key gives; None if it is absent."""
    if value is None:
        return None
    if isinstance(value, str) and (written := _BLOCK.fullmatch(value)):
        value = [int(size) for size in written.groups()]
    check(
        isinstance(value, list)
        and len(value) == 2
        and all(type(v) is int and 0 < v < 1 << 31 for v in value),
        f"`{key}` must be two positive integers, got {str(value)[:100]}",
    )
    check(value[1] % 32 == 0, f"`{key}` must have a multiple of 32 columns, got {value[1]}")
    return value[0], value[1]
