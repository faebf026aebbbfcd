"""Latent attention by file format: what is native, FP8 and older GGUF files, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_families import EXACT_OTHERWISE
from tests.support.checkpoints import Model, load_model, make_model, our_logits, reference_logits, save
from tests.support.families_page import config_of
from tests.support.family_case import FamilyCase
from tests.support.family_files import gguf_file, reference
from tests.support.family_latent import LATENT_CASES
from tests.support.family_scores import differences, score
from tests.support.quantised import float8_tensors
from tgi_asgi.errors import ModelLoadError, NotInFamily
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.loading.recognise import read_config

ATTENTION = "model.layers.1.self_attn"
SIZES: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
IDS = [3, 17, 80, 4, 150, 31, 9, 9, 77, 2, 64, 120]

Tensors = dict[str, torch.Tensor]


def tiny_model(**changes: Any) -> Model:
    return make_model("MiniCPM3", **{**SIZES, **changes})


def cut(name: str) -> Callable[[Tensors], None]:
    """Return a change that removes the last row of a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    return change


def without(name: str) -> Callable[[Tensors], None]:
    """Return a change that removes a tensor."""

    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def change_config(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("case", LATENT_CASES, ids=lambda case: case.name)
def test_models_are_computed_by_families_of_ours(case: FamilyCase) -> None:
    config = config_of(case)
    read_config(config)
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        with pytest.raises(NotInFamily, match="latent attention needs multiples of 32"):
            read_config(config | {key: 40})
        with pytest.raises(ModelLoadError, match=f"`{key}` must be one integer"):
            read_config(config | {key: "many"})
    with pytest.raises(NotInFamily, match="up to 512"):
        read_config(config | {"kv_lora_rank": 544})


def test_a_token_keeps_one_row_a_layer(tmp_path: Path) -> None:
    model = load_model(save(tiny_model(), tmp_path))
    shapes = {(cache.num_kv_heads, cache.head_dim, cache.value_dim) for cache in model.config.caches}
    assert shapes == {(1, 96, 64)}
    assert all(cache.is_latent for cache in model.config.caches)


@pytest.mark.parametrize("chunk", [512, 5])
def test_fp8_in_blocks_means_what_its_scales_say(tmp_path: Path, chunk: int) -> None:
    """Quantise all attention matrices as DeepSeek does, including the latents' projections."""
    model = tiny_model()
    files = save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        if ".self_attn." in name and parameter.dim() == 2:
            made, weights = float8_tensors(parameter.detach(), "block")
            del tensors[name]
            tensors |= {name.replace("weight", key): tensor for key, tensor in made.items()}
            parameter.data.copy_(weights)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    change_config(
        tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32], "fmt": "e4m3"}
    )
    expected = reference_logits(model, IDS)
    found = our_logits(files, IDS, chunk=chunk)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without(f"{ATTENTION}.kv_a_proj_with_mqa.weight"),
            "there is no tensor '{}.kv_a_proj_with_mqa.weight'",
        ),
        (without(f"{ATTENTION}.kv_b_proj.weight"), "there is no tensor '{}.kv_b_proj.weight'"),
        (without(f"{ATTENTION}.q_a_layernorm.weight"), "there is no tensor '{}.q_a_layernorm.weight'"),
        (
            cut(f"{ATTENTION}.kv_a_proj_with_mqa.weight"),
            r"'{}.kv_a_proj_with_mqa.weight' has the shape \[95, 64\].*\[96, 64\]",
        ),
        (
            cut(f"{ATTENTION}.kv_a_layernorm.weight"),
            r"'{}.kv_a_layernorm.weight' has the shape \[63\].*\[64\]",
        ),
        (
            cut(f"{ATTENTION}.kv_b_proj.weight"),
            r"'{}.kv_b_proj.weight' has the shape \[383, 64\].*\[384, 64\]",
        ),
    ],
)
def test_a_damaged_checkpoint_names_the_tensor(
    tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    files = save(tiny_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=message.format(re.escape(ATTENTION))):
        load_model(files)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_lora_rank": 32}, r"'model.layers.0.self_attn.kv_a_proj_with_mqa.weight' .*\[64, 64\]"),
        ({"q_lora_rank": 32}, r"'model.layers.0.self_attn.q_a_proj.weight' .*\[32, 64\]"),
        ({"q_lora_rank": None}, "there is no tensor 'model.layers.0.self_attn.q_proj.weight'"),
        ({"v_head_dim": 32}, r"'model.layers.0.self_attn.kv_b_proj.weight' .*\[256, 64\]"),
        ({"kv_lora_rank": "many"}, "`kv_lora_rank` must be one integer, got many"),
    ],
    ids=str,
)
def test_sizes_that_contradict_a_checkpoint_are_refused(
    tmp_path: Path, config: Mapping[str, Any], message: str
) -> None:
    files = save(tiny_model(), tmp_path)
    change_config(tmp_path, **config)
    with pytest.raises(ModelLoadError, match=message):
        load_model(files)


def older(source: Path, target: Path, num_heads: int) -> None:
    """Write a file as llama.cpp's converter did before it separated keys and values."""
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    writer = gguf.GGUFWriter(target, fields["general.architecture"])
    widths = {key: fields.pop(f"deepseek2.attention.{key}_mla") for key in ("key_length", "value_length")}
    fields |= {f"deepseek2.attention.{key}": width for key, width in widths.items()}
    fields["deepseek2.attention.head_count_kv"] = num_heads
    for name, value in fields.items():
        if name.startswith(("deepseek2.", "tokenizer.")):
            kinds = reader.fields[name if name in reader.fields else f"{name}_mla"].types
            writer.add_key_value(name, value, *kinds)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name in [name for name in tensors if ".attn_k_b." in name]:
        keys, values = tensors.pop(name), tensors.pop(name.replace("_k_b", "_v_b"))
        both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
        tensors[name.replace("_k_b", "_kv_b")] = np.ascontiguousarray(both.reshape(-1, both.shape[2]))
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.demo
def test_older_gguf_files_have_keys_and_values_in_one(tmp_path: Path) -> None:
    case = next(case for case in LATENT_CASES if case.name == "deepseek_v2-lite")
    older(gguf_file(case, "f32").path, tmp_path / "old.gguf", case.config["num_attention_heads"])
    found = reference(case)
    job = score(case, ModelFiles(case.name, None, "gguf", tmp_path / "old.gguf"), found, "float32")
    assert differences(job, found).max() <= EXACT_OTHERWISE
