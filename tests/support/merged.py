"""Adapters that are served as models: making, changing, merging and refusing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import make_model, save, save_tokenizer
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.loading.merged import MergedCheckpoint
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.settings import Settings

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]  # parameters of a stack of experts


def find(adapter: Path) -> ModelFiles:
    """Return the files of an adapter that is served as a model."""
    return resolve(Settings(model_id=str(adapter)), lambda *_: None)


def refusal(adapter: Path) -> str:
    """Return why such an adapter is refused."""
    with pytest.raises(ModelLoadError) as caught, OpenModel(find(adapter)):
        pass
    return str(caught.value)


def merge(base: Path, adapter: Path) -> MergedCheckpoint:
    """Return a base's weights with an adapter merged into them."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return MergedCheckpoint(Checkpoint.open(base), config, adapter)


def save_base(folder: Path, **changes: Any) -> Path:
    """Save a small Llama with a tokenizer."""
    save(make_model(**changes), folder)
    save_tokenizer(folder)
    return folder


def name_base(adapter: Path, base: Path | str | None) -> None:
    """Write into an adapter's configuration what it was trained on."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": base and str(base)}), encoding="utf-8")


def changed(adapter: Path, **tensors: torch.Tensor | None) -> Path:
    """Replace tensors of an adapter's file, or remove them."""
    path = adapter / "adapter_model.safetensors"
    found = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path)
    return adapter
