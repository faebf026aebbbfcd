"""Small checkpoints written by the `compressed-tensors` package, with the weights it reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoints import Model
from tgi_asgi.formats.sources import ModelFiles


def save_compressed(model: Model, folder: Path, format: str, **weights: Any) -> ModelFiles:
    """Compress and write a model, except its embedding and head; its weights become what the package reads.

    Args:
        format: Name of the package's format, for example pack-quantized.
        weights: Arguments of the package's `QuantizationArgs`.
    """
    return save_groups(model, folder, {"Linear": (format, weights)})


def save_groups(model: Model, folder: Path, groups: dict[str, tuple[str, dict[str, Any]]]) -> ModelFiles:
    """Do as `save_compressed` for several groups of layers: format and arguments, by pattern of names."""
    schemes = {
        pattern: QuantizationScheme(targets=[pattern], weights=QuantizationArgs(**weights), format=format)
        for pattern, (format, weights) in groups.items()
    }
    formats = {format for format, _ in groups.values()}
    whole = formats.pop() if len(formats) == 1 else "mixed-precision"
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    named = {f"group_{index}": scheme for index, scheme in enumerate(schemes.values())}
    apply_quantization_config(
        model, QuantizationConfig(config_groups=named, ignore=["lm_head"], format=whole)
    )
    for module in linears.values():
        scheme: Any = module.quantization_scheme
        _calibrate(module, scheme.weights)
    single = whole if len(schemes) == 1 else None
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=single)
    compressor.compress_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    model.float()  # four-bit floats are read as bfloat16
    for module in linears.values():
        del module.quantization_scheme  # its forward pass must not round anything
        module.__dict__.pop("forward")  # installed by the package
    return ModelFiles(whole, None, "directory", folder)


def _calibrate(module: torch.nn.Linear, arguments: QuantizationArgs) -> None:
    """Set scales and zero points from the smallest and largest weight, in float16 as in checkpoints."""
    low, high = _extremes(module.weight.detach(), arguments)
    has_global = hasattr(module, "weight_global_scale")
    whole = generate_gparam(low.min(), high.max()) if has_global else None
    scale, zero_point = calculate_qparams(low, high, arguments, global_scale=whole)
    is_small = (arguments.num_bits == 4 and arguments.type == "float") or arguments.scale_dtype is not None
    found = {"weight_scale": scale if is_small else scale.half().float(), "weight_zero_point": zero_point}
    for name, value in {**found, "weight_global_scale": whole}.items():
        parameter = getattr(module, name, None)
        if parameter is not None:
            parameter.data = value.reshape(parameter.shape)


def _extremes(weight: Tensor, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    kind = arguments.strategy or "tensor"
    if kind == "block":
        height, width = arguments.block_structure
        blocks = weight.reshape(rows // height, height, columns // width, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    runs = {
        "tensor": weight.reshape(1, 1, -1),
        "channel": weight.reshape(rows, 1, -1),
        "group": weight.reshape(rows, -1, arguments.group_size or columns),
        "tensor_group": weight.reshape(rows, -1, arguments.group_size or columns),
    }[kind]
    return runs.amin(-1), runs.amax(-1)
