"""Read a checkpoint's config.json, and the quantisation files that some checkpoints keep next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgi_asgi.formats.files import read_json

# AutoGPTQ's and AutoAWQ's own files, from before `transformers` had a key for them.
_OF_QUANTISERS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_OLD_NAME = "compression_config"  # compressed-tensors' until 2024
_OF_MODELOPT = "hf_quant_config.json"  # the only description in checkpoints of older versions


def read_config_file(directory: Path) -> dict[str, Any]:
    """Return config.json; `quantization_config` may be its text part's, or come from a file next to it.

    Raises:
        ModelLoadError: if a file is absent or damaged.
    """
    config = read_json(directory / "config.json")
    if config.get("quantization_config") is None and isinstance(config.get(_OLD_NAME), dict):
        config["quantization_config"] = config.pop(_OLD_NAME)
    text = config.get("text_config")
    if config.get("quantization_config") is None and isinstance(text, dict):
        config["quantization_config"] = text.get("quantization_config")
    for name, method in _OF_QUANTISERS.items():
        if config.get("quantization_config") is None and (directory / name).is_file():
            config["quantization_config"] = {"quant_method": method, **read_json(directory / name)}
    if config.get("quantization_config") is None and (directory / _OF_MODELOPT).is_file():
        found = read_json(directory / _OF_MODELOPT).get("quantization")
        if isinstance(found, dict):
            config["quantization_config"] = {"quant_method": "modelopt", **found}
    return config
