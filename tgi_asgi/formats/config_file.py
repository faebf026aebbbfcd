"""Read a checkpoint's config.json, with what older ones say beside it of how they are quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgi_asgi.formats.files import read_json

# AutoGPTQ's and AutoAWQ's own, of before `transformers` had a place for it.
_OF_QUANTISERS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_config_file(directory: Path) -> dict[str, Any]:
    """Return what config.json says; `quantization_config` may be that of a file beside it.

    Raises:
        ModelLoadError: a file is absent or damaged.
    """
    config = read_json(directory / "config.json")
    for name, method in _OF_QUANTISERS.items():
        if config.get("quantization_config") is None and (directory / name).is_file():
            config["quantization_config"] = {"quant_method": method, **read_json(directory / name)}
    return config
