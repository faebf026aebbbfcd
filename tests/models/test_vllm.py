"""GPTQ and AWQ checkpoints against vLLM, which has its own readers and kernels for them.

What vLLM gives is kept in oracle/vllm.json, which oracle/record_vllm.py has made. It computes in bfloat16: the
tolerance is what that costs, and a zero point that is off by one is far outside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.oracle.record_vllm import digest
from tests.support.checkpoints import make_model, our_logits
from tests.support.quantised import save_quantised
from tgi_asgi.formats.sources import ModelFiles

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq-4": ("gptq", {"group": 128}),
    "gptq-4-symmetric": ("gptq", {"group": 128, "is_centred": True}),
    "gptq-4-act-order": ("gptq", {"group": 128, "is_centred": True, "has_order": True}),
    "gptq-8": ("gptq", {"group": 128, "bits": 8, "is_centred": True}),
    "awq-4": ("awq", {"group": 128}),
}
IDS = np.random.default_rng(3).integers(3, 160, 64).tolist()


def make_checkpoint(name: str, folder: Path) -> ModelFiles:
    """Write a checkpoint, the same each time."""
    recipe, options = RECIPES[name]
    model = make_model(**SHAPE)
    with torch.no_grad():
        model.lm_head.weight /= 4  # likely tokens, but not certain ones
    return save_quantised(model, folder, recipe, **options)
