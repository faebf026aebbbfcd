"""GGUF files that the code of `transformers` computes, as llama.cpp's converter writes them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.models.test_gguf_nvfp4 import save_nvfp4
from tests.support.family_case import FamilyCase
from tests.support.family_files import checkpoint, convert, gguf_file, reference
from tests.support.family_scores import differences, score
from tests.support.gguf_changes import random_changes
from tests.support.gguf_modules import MODULE_CASES, MORE_MODULE_CASES
from tests.support.gguf_vision import changed
from tests.support.runner_driver import Job
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.generic.model import GenericConfig, GenericModel
from tgi_asgi.models.generic.modules import Embedding
from tgi_asgi.models.gguf_module import find_module
from tgi_asgi.models.loading.gguf_module import GgufModuleWeights
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.recognise import read_gguf_module

EXACT = 5e-5  # of a log-probability; correct results are within 1e-5
LOOSE = 0.15  # the median with activations in int8: at a near tie, another expert may be chosen
# Likewise, of models whose recurrent layers enlarge what rounding of weights changes.
SENSITIVE = {"kimi-linear": 0.4}

CASES = {case.name: case for case in (*MODULE_CASES, *MORE_MODULE_CASES)}
MARKED = [
    *((case, ()) for case in MODULE_CASES),
    *((case, (pytest.mark.models,)) for case in MORE_MODULE_CASES),
]
CODED = ("minimax-m2", "nemotron_h", "gemma3n")  # in `make test`, whose Q8_0 is read as values and as codes
FORMS = [
    pytest.param(
        case, form, id=f"{case.name}-{form}",
        marks=marks if form == "f32" or case.name in CODED else pytest.mark.models,
    )
    for case, marks in MARKED
    for form in case.gguf
]  # fmt: skip

pytestmark = pytest.mark.demo  # llama.cpp's converter is fetched


@pytest.fixture(autouse=True)
def _mistral4() -> None:
    """Let `transformers` open Mistral 4 by its type, which it knows as a part of a model for images only."""
    kind = transformers.Mistral4Config
    transformers.AutoModelForCausalLM.register(kind, transformers.Mistral4ForCausalLM, exist_ok=True)


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_log_probabilities_are_those_of_transformers(case: FamilyCase, form: str) -> None:
    found = reference(case)
    job = score(case, gguf_file(case, form), found, "float32", "transformers")
    assert differences(job, found).max() <= EXACT
    assert job.token_ids == found.token_ids


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=marks if case.name in CODED else pytest.mark.models)
        for case, marks in MARKED
    ],
)
def test_default_arithmetic_stays_close(case: FamilyCase) -> None:
    found = reference(case)
    file = gguf_file(case, "q8_0")
    job = score(case, file, found, "auto", "transformers")
    assert np.median(differences(job, found)) <= SENSITIVE.get(case.name, LOOSE)
    if case.name in SENSITIVE:  # then compare with the file's own values, too
        assert between(job, score(case, file, found, "float32", "transformers")) <= LOOSE


def between(job: Job, other: Job) -> float:
    """Return the median over positions of the largest difference of two runs' log-probabilities."""
    apart = []
    for ours, theirs in zip(job.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
        # None is the token that follows.
        first, second = ({None: each[0], **dict(each[1])} for each in (ours, theirs))
        apart.append(max(abs(first[token] - second[token]) for token in first.keys() & second.keys()))
    return float(np.median(apart))


@pytest.mark.models
@pytest.mark.parametrize(
    "wrong", ["0.self_attn.q_proj", "2.self_attn.kv_b_proj", "1.mlp.gate.weight", "3.self_attn.A_log"]
)
def test_one_wrong_tensor_of_kimi_linear_is_not_close(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a matrix in the other's place, or one rate of decay for all heads, must exceed the bound."""
    get = GgufModuleWeights.get

    def faulty(self: GgufModuleWeights, name: str, *given: Any) -> ops.WeightSource:
        source = get(self, name, *given)
        if f"layers.{wrong}" not in name:
            return source
        if "A_log" in wrong:
            return ops.from_floats(np.zeros_like(ops.decode(source)))
        return source.in_rows(np.roll(np.arange(source.shape[0]), source.shape[0] // 2))

    case = CASES["kimi-linear"]
    found, file = reference(case), gguf_file(case, "q8_0")
    exact = score(case, file, found, "float32")
    monkeypatch.setattr(GgufModuleWeights, "get", faulty)
    assert between(score(case, file, found, "auto"), exact) > 1.5 * LOOSE


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma4-shared", {"attention.shared_kv_layers": 6}, "no layer to share with"),
        ("gemma4-shared", {"attention.shared_kv_layers": -1}, "no layer to share with"),
        ("gemma4-shared", {"attention.sliding_window_pattern": [True]}, "must be a list of 6 values"),
        ("gemma4-shared", {"feed_forward_length": [192] * 5 + [191]}, "must be one size"),
        ("gemma4-shared", {"feed_forward_length": [192] * 5}, "or one for each layer"),
        ("gemma4-shared", {"rope.dimension_count": 32}, "must be that of a head"),
        ("gemma4-shared", {"attention.value_length": 32}, "must have the size of its keys"),
        ("gemma4-shared", {"block_count": 1 << 40}, "must be in"),
        ("gemma4-shared", {"rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ("gemma4-experts", {"attention.head_count_kv": [4, 2, 2] * 2}, "differs between layers of one kind"),
        ("gemma4-experts", {"expert_used_count": 7}, "must be in 1..6"),
        ("minimax-m2", {"expert_gating_func": 1}, "expert_gating_func"),
        ("nemotron_h", {"nextn_predict_layers": 4}, "leaves 0 layers"),
        ("nemotron_h", {"attention.head_count_kv": [0, 2, 2, 0]}, "attention or an MLP, not both"),
        ("nemotron_h-experts", {"feed_forward_length": [0, 64, 0, 32]}, "must have the same sizes"),
        ("gemma3n", {"activation_sparsity_scale": [0.5]}, "must be a list of 6 numbers"),
        ("gemma3n", {"altup.num_inputs": None}, "lacks `altup.num_inputs`"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    name: str, changes: Mapping[str, Any], reason: str
) -> None:
    check_refused(name, changes, reason)


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mamba", {"ssm.inner_size": 200}, "must be a multiple of 128"),
        ("mamba", {"ssm.state_size": 0}, "must be in"),
        ("mamba2", {"ssm.time_step_rank": 7}, "must be whole heads"),
        ("jamba", {"attention.head_count_kv": [0, 2, 0, 1]}, "the same number of KV heads"),
        ("jamba", {"attention.head_count_kv": [0, 0, 2, 2]}, "have no period"),
        ("jamba", {"attention.head_count_kv": [0] * 4}, "must have layers with attention"),
        ("jamba", {"expert_count": 0}, "must be that of the layers with experts"),
        ("exaone-moe", {"expert_gating_func": 1}, "expert_gating_func"),
        ("exaone-moe", {"nextn_predict_layers": 4}, "leaves 0 layers"),
        ("exaone-moe", {"leading_dense_block_count": 5}, "must be at most 4"),
        ("exaone-moe", {"attention.sliding_window_pattern": [True]}, "must be a list of 4 values"),
        ("afmoe", {"expert_weights_norm": False}, "expert_weights_norm"),
        ("llama4", {"attention.sliding_window": 0}, "MobileLLM"),
        ("llama4", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step must be in"),
        ("llama4", {"expert_used_count": 7}, "must be in 1..6"),
        ("llama4", {"rope.dimension_count": 16}, "rope.dimension_count"),
        ("llama4", {"rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ("mimo2", {"attention.head_count_kv": [2, 4, 2, 2, 4, 4, 4]}, "twice the KV heads"),
        ("mimo2", {"attention.head_count_kv": [2, 4]}, "or one for each layer"),
        ("mimo2", {"nextn_predict_layers": 7}, "leaves 0 layers"),
        ("mimo2", {"nextn_predict_layers": -1}, "leaves 8 layers"),
        ("mimo2", {"attention.sliding_window_pattern": [0, 2, 1, 0]}, "must be a list of 4 values"),
        ("mimo2", {"expert_gating_func": 1}, "expert_gating_func"),
        ("mimo2", {"expert_group_used_count": 3}, "expert_group_used_count must be in"),
        ("kimi-linear", {"attention.head_count_kv": [0, 0]}, "or one for each layer"),
        ("kimi-linear", {"leading_dense_block_count": 5}, "must be at most 4"),
        ("kimi-linear", {"kda.head_dim": 0}, "kda.head_dim must be in"),
        ("kimi-linear", {"kda.safe_gate": True}, "kda.safe_gate"),
        ("kimi-linear", {"expert_gating_func": 1}, "expert_gating_func"),
        ("mistral4", {"expert_gating_func": 2}, "expert_gating_func"),
        ("mistral4", {"attention.kv_lora_rank": 0}, "heads and latents cannot have"),
        ("mistral4", {"attention.q_lora_rank": -1}, "q_lora_rank must be positive"),
        ("mistral4", {"rope.scaling.type": "linear"}, "type 'linear' is not supported"),
        ("mistral4", {"rope.scaling.type": None}, "type 'linear' is not supported"),  # but a factor
        ("mistral4", {"attention.temperature_length": 32}, "temperature_length"),
        ("mistral4", {"expert_group_count": 0, "expert_shared_count": 0}, "expert_shared_count must be in"),
    ],
)
def test_further_files_that_contradict_themselves_are_refused(
    name: str, changes: Mapping[str, Any], reason: str
) -> None:
    check_refused(name, changes, reason)


# Of these, nemotron_h's file has eight experts, others have six; two of them serve a token.
ROUTED = ("nemotron_h-experts", "exaone-moe", "mimo2", "kimi-linear", "mistral4")


@pytest.mark.models
@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize(
    ("count", "used", "used_experts", "reason"),
    [
        (6, 1, 2, "into groups of two or more, got 6"),  # of one, or of no whole number
        (5, 1, 2, "expert_group_count must divide the [68] experts into groups of two or more, got 5"),
        (-2, 1, 2, "into groups of two or more, got -2"),
        (1 << 40, 1, 2, "into groups of two or more"),
        (2, 0, 2, "expert_group_used_count must be in 1..2, got 0"),
        (2, 3, 2, "expert_group_used_count must be in 1..2, got 3"),
        (2, -1, 2, "expert_group_used_count must be in 1..2, got -1"),
        (2, None, 2, "lacks `expert_group_used_count`"),
        (2, 1, 5, "expert_used_count must be in 1..[34], got 5"),
        (0, 0, 0, "expert_used_count must be in 1..[68], got 0"),
    ],
)
def test_groups_that_cannot_have_a_token_s_experts_are_refused(
    name: str, count: int, used: int | None, used_experts: int, reason: str
) -> None:
    changes = {
        "expert_group_count": count, "expert_group_used_count": used, "expert_used_count": used_experts,
    }  # fmt: skip
    check_refused(name, changes, reason)


@pytest.mark.models
@pytest.mark.parametrize("name", ROUTED)
def test_no_groups_are_one(name: str) -> None:
    with GgufFile.open(gguf_file(CASES[name], "f32").path) as file:
        kind = file.metadata["general.architecture"]
        module = find_module(kind)
        assert module is not None
        for key in ("expert_group_count", "expert_group_used_count"):
            file.metadata[f"{kind}.{key}"] = 0
        config = read_gguf_module(module, file)
        assert (config["n_group"], config["topk_group"]) == (1, 1)


def check_refused(name: str, changes: Mapping[str, Any], reason: str) -> None:
    with GgufFile.open(gguf_file(CASES[name], "f32").path) as file:
        kind = file.metadata["general.architecture"]
        module = find_module(kind)
        assert module is not None
        read_gguf_module(module, file)
        file.metadata.update({f"{kind}.{key}": value for key, value in changes.items()})
        with pytest.raises(ModelLoadError, match=reason):
            read_gguf_module(module, file)


def test_only_transformers_computes_some() -> None:
    with pytest.raises(ModelLoadError, match="no native family has GGUF files of gemma3n"):
        OpenModel(gguf_file(CASES["gemma3n"], "f32"), model_impl="native")


@pytest.mark.parametrize(
    "name",
    [
        "gemma4-shared",
        "gemma4-experts",
        *(pytest.param(name, marks=pytest.mark.models) for name in ("mamba", "falcon_mamba", "jamba")),
    ],
)
def test_a_native_family_leaves_a_file_to_transformers_on_a_gpu(name: str) -> None:
    with OpenModel(gguf_file(CASES[name], "f32"), model_impl="auto") as opened:
        assert isinstance(opened.config, ModelConfig)
        opened.leave_to_module("the GPU lacks something")
        assert isinstance(opened.load(ops.Packing(is_exact=True), 64), GenericModel)


@pytest.mark.models
@pytest.mark.parametrize("model_impl", ["native", "transformers"])
def test_states_that_would_grow_are_refused(model_impl: str, tmp_path: Path) -> None:
    file = gguf_file(CASES["mamba"], "f32")
    with GgufFile.open(file.path) as opened:
        rates = opened.raw("blk.1.ssm_a").view(np.float32).reshape(256, 16).copy()
    rates[7, 3] = 0.25
    path = changed(file.path, tmp_path / "changed.gguf", {}, {"blk.1.ssm_a": rates})
    model = OpenModel(dataclasses.replace(file, path=path), model_impl=model_impl)
    with model, pytest.raises(ModelLoadError, match=r"must be negative|must not be positive"):
        model.load(ops.Packing(is_exact=True), 64)


def test_a_file_that_must_be_native_is_refused_on_a_gpu() -> None:
    opened = OpenModel(gguf_file(CASES["gemma4-shared"], "f32"), model_impl="native")
    with opened, pytest.raises(ModelLoadError, match="the GPU lacks something"):
        opened.leave_to_module("the GPU lacks something")


def test_layers_that_only_draft_are_not_read() -> None:
    module = find_module("nemotron_h")
    assert module is not None
    file = GgufFile.open(gguf_file(CASES["nemotron_h"], "f32").path)
    with contextlib.closing(GgufModuleWeights(file, module, num_layers=3)) as weights:
        layers = {name.split(".")[2] for name in weights.names() if ".layers." in name}
        assert layers == {"0", "1", "2"}
        assert not any(name.startswith("blk.3.") for name in weights.unread())


def test_nvfp4_gives_what_the_checkpoint_gives(tmp_path: Path) -> None:
    case = CASES["gemma4-shared"]
    made = save_nvfp4(checkpoint(case).path, tmp_path / "checkpoint")
    convert(made.path, ("f32",), tmp_path)
    file = ModelFiles("nvfp4", None, "gguf", tmp_path / "f32.gguf")
    with GgufFile.open(file.path) as opened:
        assert "blk.0.attn_q.scale" in opened.tensors, "the converter writes no second scale"
    expected, found = (
        [row[0] for row in score(case, files, reference(case), "float32").prompt_logprobs[1:] if row[0]]
        for files in (made, file)
    )
    assert np.std(expected) > 0.5, "flat logits prove nothing"
    np.testing.assert_allclose(found, expected, atol=1e-3)


def load(name: str) -> GenericModel:
    with OpenModel(gguf_file(CASES[name], "q8_0"), model_impl="transformers") as opened:
        model = opened.load(ops.Packing(is_exact=False), 64)
    assert isinstance(model, GenericModel)
    return model


def test_experts_keep_the_files_codes() -> None:
    layer = load("gemma4-experts").module.model.layers[0]
    check_codes(layer.experts, 6 * 64)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks) for case, marks in MARKED])
def test_formats_are_foretold(case: FamilyCase) -> None:
    """The memory that weights need is counted before they are read, by their formats and sizes."""
    with OpenModel(gguf_file(case, "q8_0"), model_impl="transformers") as opened:
        weights = opened.weights
        assert isinstance(weights, GgufModuleWeights)
        found = {name: weights.get(name, weights.shape(name)) for name in weights.names()}
        made = {name: (each.format, math.prod(each.shape)) for name, each in found.items()}
        assert weights.stored() == made
    assert "Q8_0" in {format for format, _ in made.values()}


@pytest.mark.models
def test_experts_of_llama4_keep_the_files_codes() -> None:
    layer = load("llama4").module.model.layers[0]
    check_codes(layer.feed_forward.experts, 6 * 64)


@pytest.mark.models
@pytest.mark.parametrize("name", ["llama4", "mistral4", "mimo2", "kimi-linear"])
def test_sequences_run_in_batches(name: str) -> None:
    with OpenModel(gguf_file(CASES[name], "f32"), model_impl="transformers") as opened:
        assert isinstance(opened.config, GenericConfig)
        assert opened.config.sequential_reason == ""


@pytest.mark.models
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name",
    ["llama4", "mistral4", "mimo2", "kimi-linear", "gemma4-shared", "gemma4-experts", "nemotron_h-experts",
     "mamba2"],
)  # fmt: skip
def test_random_metadata_is_served_or_refused(name: str, seed: int, tmp_path: Path) -> None:
    file = gguf_file(CASES[name], "f32")
    for metadata in random_changes(file.path, seed, 8):
        path = changed(file.path, tmp_path / "changed.gguf", metadata, {})
        with (
            contextlib.suppress(ModelLoadError),
            OpenModel(dataclasses.replace(file, path=path), model_impl="auto") as opened,
        ):
            opened.load(ops.Packing(is_exact=True), 64)


def check_codes(experts: Any, num_rows: int) -> None:
    """Check that experts with as many rows in all take little more than a byte for each weight."""
    assert experts.tgi_experts.nbytes < 1.3 * 3 * num_rows * 128  # as floats at least twice


@pytest.mark.parametrize("name", ["gemma4-shared", "gemma3n"])
def test_embeddings_of_layers_keep_the_files_codes(name: str) -> None:
    """They are the larger part of small models: in Gemma 4 E2B, 2.3 billion numbers."""
    table = load(name).module.model.embed_tokens_per_layer
    assert isinstance(table, Embedding)
    assert table.packed.made.matrix.nbytes < 1.3 * table.num_embeddings * table.embedding_dim
