"""Gemma 3n with images: rows of its own for tokens of its two other vocabularies, and inputs of each layer.

Its tower is timm's, which is not installed here: another one, with a single product, stands in for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.support import vision_family, vision_table
from tests.support import vision_models as vision
from tests.support.vision_models import picture
from tests.support.vision_runs import load, run
from tgi_asgi import ops
from tgi_asgi.models.generic.open import OpenGeneric

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code

_FIRST_OF_IMAGES, _FIRST_OF_SOUNDS = 400, 408
_FAMILY = vision_family.Family(
    "Gemma3nForConditionalGeneration",
    {
        "text_config": {
            **vision_table._LLAMA, "model_type": "gemma3n_text", "num_hidden_layers": 4, "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "tie_word_embeddings": True,
            "vocab_size_per_layer_input": _FIRST_OF_IMAGES, "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2, "pad_token_id": 0,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
        "vision_config": {"hidden_size": 32, "vocab_size": 8, "vocab_offset": _FIRST_OF_IMAGES},
        "audio_config": {
            "hidden_size": 32, "vocab_size": 8, "vocab_offset": _FIRST_OF_SOUNDS,
            "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [8, 4],
        },
        "vision_soft_tokens_per_image": 16,
    },
    "SiglipImageProcessor",
    {"size": {"height": 28, "width": 28}},
    {"image_seq_length": 16},
    {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>",
    },
)  # fmt: skip


class _Tower(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 7, stride=7)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.embed(pixel_values))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    ops.configure_threads(1, nice=0, pin=False)

    def from_config(config: Any) -> Any:
        is_tower = config.model_type == "gemma3n_vision"
        return _Tower(config.hidden_size) if is_tower else AutoModel.from_config(config)

    stand_in = SimpleNamespace(from_config=from_config)
    monkeypatch.setattr("transformers.models.gemma3n.modeling_gemma3n.AutoModel", stand_in)
    monkeypatch.setitem(vision_table.FAMILIES, "gemma3n", _FAMILY)
    vision.make("gemma3n", tmp_path)
    return tmp_path


def test_logits_are_those_of_transformers(folder: Path) -> None:
    answer = [120, _FIRST_OF_IMAGES + 2, _FIRST_OF_SOUNDS + 3, 121]
    parts: list[list[Any]] = [["what is ", picture(50, 30), " and ", picture(40, 70, 1), "?"], ["no picture"]]
    prompts = [vision.prompt_of("gemma3n", folder, each) for each in parts]
    wanted = [vision.reference(folder, prompt, answer) for prompt in prompts]
    model = load(folder)
    for chunks in ([1000, 1000], [7, 3]):
        found, _ = run(model, [(prompt, answer) for prompt in prompts], chunks)
        for logits, expected in zip(found, wanted, strict=True):
            assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


def test_it_passes_the_check_with_an_image(folder: Path) -> None:
    from tgi_asgi.formats.quantised import Quantisation
    from tgi_asgi.models.loading.safetensors import SafetensorsWeights

    config = json.loads((folder / "config.json").read_text())
    opened = OpenGeneric(folder, config, trusts_code=False)
    assert opened.image_processor(folder) is not None
    opened.load(
        SafetensorsWeights(folder, Quantisation.from_json(config)),
        ops.Packing(is_exact=True, quantise=None),
        2048,
    )
