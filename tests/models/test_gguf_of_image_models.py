"""GGUF files of models that accept images hold their text model, which native families compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.support import family_files, family_maker
from tests.support.checkpoints import our_logits
from tests.support.vision_table import FAMILIES
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles

IDS = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(3)).tolist()

pytestmark = pytest.mark.demo  # llama.cpp's converter is fetched


_QWEN3 = FAMILIES["qwen3_vl"].config
_EXPERTS = {
    "text_config": {
        **_QWEN3["text_config"], "model_type": "qwen3_vl_moe_text", "decoder_sparse_step": 1,
        "mlp_only_layers": [], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "vision_config": _QWEN3["vision_config"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "architecture", "config"),
    [
        ("qwen2vl", "Qwen2_5_VLForConditionalGeneration", FAMILIES["qwen2_5_vl"].config),
        ("qwen3vl", "Qwen3VLForConditionalGeneration", _QWEN3),
        ("qwen3vlmoe", "Qwen3VLMoeForConditionalGeneration", _EXPERTS),
    ],
)
def test_text_has_the_logits_of_transformers(
    kind: str, architecture: str, config: Mapping[str, Any], tmp_path: Path
) -> None:
    made = getattr(transformers, architecture)
    torch.manual_seed(4)
    model = made(made.config_class(**copy.deepcopy(dict(config)))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(tmp_path)
    _turn_experts(tmp_path / "model.safetensors")
    family_maker.save_tokenizer(tmp_path)
    family_files.convert(tmp_path, ("f32",), tmp_path)
    with GgufFile.open(tmp_path / "f32.gguf") as file:
        assert file.metadata["general.architecture"] == kind
        assert file.metadata[f"{kind}.rope.dimension_sections"].tolist()[:3] == [2, 3, 3]
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    found = our_logits(ModelFiles(kind, None, "gguf", tmp_path / "f32.gguf"), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _turn_experts(path: Path) -> None:
    """Store experts as published, columns first; transformers 5 turns them on loading, but not on saving."""
    tensors = safetensors.torch.load(path.read_bytes())
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
