"""Read a checkpoint's config.json, and the quantisation files that older checkpoints keep next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgi_asgi.formats.files import read_json

# AutoGPTQ's and AutoAWQ's own files, from before `transformers` had a key for them.
_OF_QUANTISERS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_config_file(directory: Path) -> dict[str, Any]:
    """Return the contents of config.json; `quantization_config` may come from a file next to it.

    Raises:
        ModelLoadError: if a file is absent or damaged.
    """
    config = read_json(directory / "config.json")
    for name, method in _OF_QUANTISERS.items():
        if config.get("quantization_config") is None and (directory / name).is_file():
            config["quantization_config"] = {"quant_method": method, **read_json(directory / name)}
    return config
