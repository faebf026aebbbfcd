"""Weights by canonical names: translation, shapes, and the row order of llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import load_model, make_model, save, save_gguf
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.family import GGUF_NAMES
from tgi_asgi.models.loading.gguf import gguf_name, join_rotary_halves
from tgi_asgi.models.loading.open import OpenModel

Q_NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("canonical", "stored"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.12.mlp.down_proj.weight", "blk.12.ffn_down.weight"),
        ("model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
        ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
    ],
)
def test_names_are_translated(canonical: str, stored: str) -> None:
    assert gguf_name(canonical, GGUF_NAMES) == stored


def test_rotary_pairs_become_halves_in_every_head() -> None:
    rows = np.array([[0, 4], [1, 5], [2, 6], [3, 7]], np.uint8)  # halves of one head
    stored = rows[[0, 2, 1, 3]]  # pairs (0, 2), (1, 3)
    two_heads = np.concatenate([stored, stored + 10])
    joined = join_rotary_halves(two_heads.reshape(-1), 8, 4)
    assert joined.reshape(8, 2).tolist() == np.concatenate([rows, rows + 10]).tolist()


def test_both_formats_give_the_same_bytes(tmp_path: Path) -> None:
    model = make_model()
    checkpoint = OpenModel(save(model, tmp_path / "directory"))
    gguf = OpenModel(save_gguf(model, tmp_path / "model.gguf", "F32"))
    with checkpoint, gguf:
        first, second = (opened.weights.get(Q_NAME, (64, 64)) for opened in (checkpoint, gguf))
        assert first.format == second.format == "F32"
        assert np.array_equal(first.data, second.data)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_wrong_shape_names_the_tensor(tmp_path: Path, kind: str) -> None:
    model = make_model()
    files = save(model, tmp_path) if kind == "directory" else save_gguf(model, tmp_path / "m.gguf", "Q8_0")
    with OpenModel(files) as opened, pytest.raises(ModelLoadError, match=r"q.*\[64, 64\].*\[32, 64\]"):
        opened.weights.get(Q_NAME, (32, 64))


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_missing_tensor_is_named(tmp_path: Path, kind: str) -> None:
    model = make_model()
    files = save(model, tmp_path) if kind == "directory" else save_gguf(model, tmp_path / "m.gguf", "Q8_0")
    with OpenModel(files) as opened, pytest.raises(ModelLoadError, match=r"no tensor '.*9"):
        opened.weights.get("model.layers.9.self_attn.q_proj.weight", (64, 64))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    files = save(make_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[Q_NAME] = torch.zeros(64, 64, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="I32; supported are F32, F16, BF16"):
        load_model(files, max_positions=16)


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        OpenModel(ModelFiles("broken", None, "directory", tmp_path))
