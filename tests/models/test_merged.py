"""Adapters that are served as models: merged into their base as `peft` merges them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import architectures, vision_models
from tests.support.adapters import make_adapter, peft_logits, peft_merged, write_adapter
from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.generic import LENGTHS, run_steps
from tests.support.merged import EXPERTS, changed, find, merge, name_base, save_base
from tgi_asgi import ops
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.loading import merged as merged_module
from tgi_asgi.models.loading.open import OpenModel

EXACT = 4e-5  # error of a logit, relative to the largest; recurrent layers come nearest
MIN_EFFECT = 0.02
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


MadeOnce = Callable[[str], Path]
further = functools.partial(pytest.param, marks=pytest.mark.models)  # of what a case without it proves
IDS = [architectures.random_ids(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    return architectures.made_once(tmp_path_factory.mktemp("architectures"), architectures.make)


@pytest.fixture(scope="module")
def logits_of_base() -> Callable[[Path], np.ndarray]:
    """Return a function that gives a checkpoint's logits without an adapter, computed once."""
    return functools.cache(lambda base: peft_logits(base, None, IDS[0])[0])


@pytest.mark.parametrize(
    ("model_type", "implementation", "changes"),
    [
        ("gemma", "native", {"target_modules": [*ATTENTION, *MLP]}),
        ("llama", "native", {"r": 5, "use_rslora": True, "rank_pattern": {"k_proj": 2}}),
        ("llama", "native", {"use_dora": True}),
        ("llama", "native", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", "transformers", {"target_modules": ["q_proj", "lm_head"]}),
        ("gemma", "native", {"target_modules": ["q_proj", "lm_head"]}),  # whose head is the embedding
        ("gemma", "native", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
        further("gemma", "transformers", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
        ("gemma", "native", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
        ("mamba", "transformers", {"target_modules": ["x_proj"], "modules_to_save": ["embeddings"]}),
        ("qwen2", "native", {"target_modules": "all-linear", "alpha_pattern": {"o_proj": 3}}),
        ("gpt2", "native", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        further(
            "gpt2", "transformers", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
        ),
        ("gemma2", "transformers", {"target_modules": [*ATTENTION, *MLP], "use_dora": True}),
        further("olmoe", "transformers", {"target_modules": ATTENTION}),
        ("hy_v3", "transformers", {"target_modules": ["o_proj", "down_proj"]}),  # renamed by transformers
        further("kimi_linear", "transformers", {"target_modules": MLP, "use_dora": True}),
        further("nemotron_h", "transformers", {"target_modules": ["in_proj", "o_proj", "down_proj"]}),
        ("llama", "native", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("gemma", "native", {"target_modules": ["embed_tokens"]}),  # whose head stays as it was
        ("gpt2", "transformers", {"target_modules": ["wte", "c_attn"]}),
        ("gpt2", "native", {"target_modules": ["wpe"]}),
        ("llama", "native", {"trainable_token_indices": [7, 300, 9]}),
        ("gemma", "native", {"trainable_token_indices": {"embed_tokens": [7, 300]}}),  # the head's, too
        ("qwen2", "native", {"bias": "all"}),
        ("gpt2", "native", {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("nemotron", "native", {"bias": "all", "modules_to_save": ["input_layernorm"]}),  # one bias thrice
        ("qwen3_moe", "native", {"target_modules": "all-linear"}),  # experts and router, too
        further("mixtral", "native", {"target_modules": "all-linear", "use_rslora": True}),
        further("dots1", "transformers", {"target_modules": ["o_proj", *MLP]}),  # beside dense layers
        ("gpt_oss", "native", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        ("granitemoe", "transformers", {"target_modules": [], "target_parameters": EXPERTS}),
        ("gpt_oss", "native", {"target_parameters": EXPERTS[1:], "rank_pattern": {"down_proj": 3}}),
    ],
)
def test_the_logits_are_those_of_peft(
    model_type: str, implementation: str, changes: dict[str, Any], tmp_path: Path, checkpoint: MadeOnce,
    logits_of_base: Callable[[Path], np.ndarray],
) -> None:  # fmt: skip
    base = checkpoint(model_type)
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, is_rounded=False, **changes)
    expected, without = peft_logits(base, adapter, *IDS), logits_of_base(base)
    assert np.abs(expected[0] - without).max() > MIN_EFFECT * np.abs(without).max()
    with OpenModel(find(adapter), model_impl=implementation) as opened:
        assert opened.is_generic is (implementation == "transformers")
        model: Any = opened.load(ops.Packing(is_exact=True), 256)
    assert run_steps(model, IDS, expected) <= EXACT


@pytest.mark.parametrize("is_copy", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_stored_head_has_the_rows_of_the_embedding_that_it_is_tied_to(
    is_tied: bool, is_copy: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=is_tied)
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if is_copy else embedding.flip(0).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, trainable_token_indices=[7, 90])
    ids = [[7, 11, 90, 34, 8, 120]]
    expected = peft_logits(base, adapter, *ids)
    with OpenModel(find(adapter)) as opened:
        model: Any = opened.load(ops.Packing(is_exact=True), 256)
    assert run_steps(model, ids, expected, [[(0, 0, 6)]]) <= EXACT


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.bfloat16, {}),
        (torch.float16, {"use_dora": True}),
        (torch.float32, {"trainable_token_indices": [3, 90, 4]}),
        (torch.bfloat16, {"trainable_token_indices": [3, 90, 4]}),
        further(torch.float16, {}),
        further(torch.float32, {}),
        further(torch.bfloat16, {"use_dora": True}),
        further(torch.float32, {"use_dora": True}),
        further(torch.float16, {"trainable_token_indices": [3, 90, 4]}),
    ],
)
def test_any_part_of_a_merged_matrix_is_what_peft_saves(
    dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both round once, from float32: they differ by one step where their sums round to different floats."""
    monkeypatch.setattr(merged_module, "_PIECE", 64 * 7)  # rows of a piece, of the smaller matrices
    save(make_model(), tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", seed=3, is_rounded=False, **changes)
    expected = peft_merged(tmp_path / "base", adapter, dtype)
    merged = merge(tmp_path / "base", adapter)
    base, random = Checkpoint.open(tmp_path / "base"), np.random.default_rng(0)
    num_changed = 0
    for name in merged:
        info, whole = merged.tensor(name), expected[name]
        start, stop = sorted(random.integers(0, info.nbytes // whole.itemsize + 1, 2) * whole.itemsize)
        part = torch.from_numpy(merged.raw(name, int(start), int(stop)).copy()).view(dtype)
        like = whole.reshape(-1)[start // whole.itemsize : stop // whole.itemsize]
        torch.testing.assert_close(part, like, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        num_changed += not np.array_equal(merged.raw(name), base.raw(name))
    assert num_changed == 21 + ("trainable_token_indices" in changes)  # seven products of three layers
    merged.close()


def test_any_part_of_a_stack_of_experts_is_what_peft_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_module, "_PIECE", 64 * 7)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    architectures.make("gpt_oss", base)
    parameters = [*EXPERTS, "gate_up_proj_bias"]
    make_adapter(base, adapter, seed=3, is_rounded=False, target_modules=[], target_parameters=parameters)
    expected = peft_merged(base, adapter, torch.float32)
    merged, random = merge(base, adapter), np.random.default_rng(0)
    for name in merged:
        if ".experts." in name:
            whole = expected[name].numpy().reshape(-1)
            for _ in range(8):
                start, stop = sorted(random.integers(0, len(whole) + 1, 2))
                part = merged.raw(name, 4 * int(start), 4 * int(stop)).view(np.float32)
                np.testing.assert_allclose(part, whole[start:stop], rtol=1e-5, atol=1e-6)
    merged.close()


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_a_vocabulary_that_the_adapter_enlarges(implementation: str, tmp_path: Path) -> None:
    """As after `add_tokens` and training of the embedding and the head."""
    base = save_base(tmp_path / "base")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(163)
    save(model, tmp_path / "larger")
    adapter = make_adapter(
        tmp_path / "larger", tmp_path / "adapter", seed=1, target_modules=["v_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
    )  # fmt: skip
    ids = [[1, 162, 5, 161], [160, 3]]
    expected = peft_logits(tmp_path / "larger", adapter, *ids)
    name_base(adapter, base)
    with OpenModel(find(adapter), model_impl=implementation) as opened:
        assert opened.config.vocab_size == 163
        loaded: Any = opened.load(ops.Packing(is_exact=True), 256)
    steps = [[(0, 0, 4), (1, 0, 2)]]
    assert run_steps(loaded, ids, expected, steps) <= EXACT


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        ({"trainable_token_indices": [160, 162]}, True),
        ({"trainable_token_indices": [160, 162]}, False),
        ({"trainable_token_indices": {"embed_tokens": [160, 162]}}, True),
        ({"target_modules": ["v_proj", "embed_tokens"]}, True),
    ],
)
def test_of_an_enlarged_vocabulary_parts_are_trained(
    config: dict[str, Any], is_tied: bool, tmp_path: Path
) -> None:
    """As after `add_tokens`: `peft` then saves whole tables beside what it has trained of them."""
    base = save_base(tmp_path / "base", tie_word_embeddings=is_tied)
    changes = {"target_modules": ["v_proj"], **config}
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, num_tokens=163, **changes)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(163)
    save(model, tmp_path / "larger")
    ids = [[1, 162, 5, 161, 160]]
    expected = peft_logits(tmp_path / "larger", adapter, *ids)
    with OpenModel(find(adapter)) as opened:
        loaded: Any = opened.load(ops.Packing(is_exact=True), 256)
    assert run_steps(loaded, ids, expected, [[(0, 0, 5)]]) <= EXACT


def test_the_tokenizer_is_the_adapters_own_and_the_ends_of_answers_the_bases(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", eos_token_id=7)
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    with OpenModel(find(adapter)) as opened:
        tokenizer, template = opened.read_text()
    assert template is None and 7 in tokenizer.eos_ids
    (base / "chat_template.jinja").write_text("the base's")
    save_tokenizer(adapter)
    (adapter / "tokenizer_config.json").write_text("{}")
    with OpenModel(find(adapter)) as opened:
        assert opened.read_text()[1] is not None
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "mine", "eos_token": "a"}')
    with OpenModel(find(adapter)) as opened:
        tokenizer, template = opened.read_text()
    assert template is not None and template.source == "mine"
    assert tokenizer.special_tokens["eos_token"] == "a" and 7 in tokenizer.eos_ids


def test_names_may_lack_the_head_s_model(tmp_path: Path) -> None:
    """Adapters of embedders are trained on models without a head, whose modules' names begin later."""
    base = save_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    path = adapter / "adapter_model.safetensors"
    tensors = {name.replace(".model.model.", ".model."): tensor for name, tensor in load_file(path).items()}
    expected = merge(base, adapter)
    save_file(tensors, path)
    found = merge(base, adapter)
    assert all(np.array_equal(found.raw(name), expected.raw(name)) for name in found)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(found.raw(name), Checkpoint.open(base).raw(name))


def test_the_layer_and_not_the_configuration_says_what_is_transposed(tmp_path: Path) -> None:
    """`peft` warns, and corrects `fan_in_fan_out` for each layer, and saves what the last one had."""
    architectures.make("gpt2", tmp_path / "base")
    changes: dict[str, Any] = {"target_modules": ["c_proj"], "fan_in_fan_out": True}
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", seed=1, **changes)
    expected = {
        name: merge(tmp_path / "base", adapter).raw(name) for name in merge(tmp_path / "base", adapter)
    }
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "fan_in_fan_out": False}), encoding="utf-8")
    found = merge(tmp_path / "base", adapter)
    assert all(np.array_equal(found.raw(name), raw) for name, raw in expected.items())


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava"])
def test_the_products_of_vision_models_are_found_whatever_their_checkpoints_call_them(
    family: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    vision_models.make(family, base)
    plain = Checkpoint.open(base)
    names = [name for name in plain if name.endswith("_proj.weight") and "vis" not in name]
    layers = {name[name.index("layers.") :].removesuffix(".weight"): name for name in names}
    shapes: dict[str, Any] = {
        f"base_model.model.model.language_model.{module}": plain.tensor(name).shape
        for module, name in layers.items()
    }
    merged = merge(base, write_adapter(tmp_path / "adapter", shapes))
    different = [name for name in plain if not np.array_equal(merged.raw(name), plain.raw(name))]
    assert names and sorted(different) == sorted(names)


@pytest.mark.parametrize("named", ["lm_head", "embed_out"])
@pytest.mark.parametrize("stored", ["lm_head", "embed_out"])
def test_the_head_of_gpt_neox_is_found_by_both_of_its_names(stored: str, named: str, tmp_path: Path) -> None:
    """`transformers` 5 calls the module `lm_head`, and still writes its matrix under the name of before."""
    architectures.make("gpt_neox", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name.replace("lm_head", "embed_out"): each for name, each in load_file(path).items()}
    head = tensors.pop("embed_out.weight")
    save_file({**tensors, f"{stored}.weight": head}, path)
    changes = write_adapter(tmp_path / "changes", {f"base_model.model.{named}": (len(head), head.shape[1])})
    other = "base_model.model.gpt_neox.layers.0.attention.dense"
    whole = write_adapter(tmp_path / "whole", {other: (64, 64)})
    changed(whole, **{f"base_model.model.{named}.weight": -head})
    for adapter, is_whole in ((changes, False), (whole, True)):
        merged = merge(tmp_path / "base", adapter)
        [name] = [each for each in merged if each.rpartition(".")[0] in ("lm_head", "embed_out")]
        assert name == f"{stored}.weight"
        found = merged.raw(name).view(np.float32).reshape(head.shape)
        assert np.array_equal(found, -head) is is_whole
        assert not np.array_equal(found, head)


def test_an_embedding_that_was_the_head_too_leaves_it_as_it_was(tmp_path: Path) -> None:
    """Phi's head has a bias, which no head of its own makes of it."""
    save(make_model("Phi", tie_word_embeddings=True), tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    changes: dict[str, Any] = {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", seed=1, **changes)
    ids = [[1, 150, 5, 131], [140, 3]]
    expected = peft_logits(tmp_path / "base", adapter, *ids)
    with OpenModel(find(adapter)) as opened:
        model: Any = opened.load(ops.Packing(is_exact=True), 256)
    assert run_steps(model, ids, expected, [[(0, 0, 4), (1, 0, 2)]]) <= EXACT


def test_a_model_without_a_head_gets_none(tmp_path: Path) -> None:
    model = make_model()
    save(model.model, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    table = torch.randn(160, 64)
    adapter = write_adapter(tmp_path / "adapter", {"base_model.model.layers.0.self_attn.q_proj": (64, 64)})
    changed(adapter, **{"base_model.model.embed_tokens.weight": table})
    name_base(adapter, tmp_path / "base")
    with OpenModel(find(adapter)) as opened:
        assert not opened.config.generates
    merged = merge(tmp_path / "base", adapter)
    assert "lm_head.weight" not in merged
    assert np.array_equal(merged.raw("embed_tokens.weight").view(np.float32), table.numpy().reshape(-1))
