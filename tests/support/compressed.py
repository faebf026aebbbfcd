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
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoints import Model
from tgi_asgi.formats.sources import ModelFiles


def save_compressed(model: Model, folder: Path, format: str, **weights: Any) -> ModelFiles:
    """Compress and write a model, except its embedding and head; its weights become what the package reads.

    Args:
        format: Name of the package's format: pack-quantized, float-quantized or naive-quantized.
        weights: Arguments of the package's `QuantizationArgs`.
    """
    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=format)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=format)
    )
    for module in linears.values():
        _calibrate(module, arguments)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=format)
    compressor.compress_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    for module in linears.values():
        del module.quantization_scheme  # its forward pass must not round anything
        module.__dict__.pop("forward")  # installed by the package
    return ModelFiles(format, None, "directory", folder)


def _calibrate(module: torch.nn.Linear, arguments: QuantizationArgs) -> None:
    """Set scales and zero points from the smallest and largest weight, in float16 as in checkpoints."""
    low, high = _extremes(module.weight.detach(), arguments)
    scale, zero_point = calculate_qparams(low, high, arguments)
    for name, value in {"weight_scale": scale, "weight_zero_point": zero_point}.items():
        parameter = getattr(module, name, None)
        if parameter is not None:
            value = value.reshape(parameter.shape)
            parameter.data = value.half().float() if name == "weight_scale" else value


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
    }[kind]
    return runs.amin(-1), runs.amax(-1)
