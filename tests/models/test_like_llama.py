"""Families without a class in `transformers`: their files give what an equal model of its gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.support.family_files import Reference
from tests.support.family_scores import differences, score
from tests.support.like_llama import LIKE_LLAMA, LikeLlama, files_of, make
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.families.baichuan import unit_rows
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.recognise import is_native, read_config, read_gguf, with_architecture
from tgi_asgi.models.loading.safetensors import SafetensorsWeights

EXACT = 5e-5  # of a log-probability; correct results are within 1e-5
LOOSE = 0.3  # with activations in int8

BY_NAME = {case.name: case for case in LIKE_LLAMA}
USUAL = ("internlm2", "minicpm", "refact", "deepseek")
MARKS = {name: () if name in USUAL else (pytest.mark.models,) for name in BY_NAME}
ROUNDED = [
    pytest.param(name, marks=MARKS[name], id=name) for name, case in BY_NAME.items() if "q8_0" in case.forms
]
FORMS = [
    pytest.param(name, form, marks=MARKS[name], id=f"{name}-{form}")
    for name, case in BY_NAME.items()
    for form in case.forms
]

pytestmark = pytest.mark.demo  # llama.cpp's converter is fetched

Made = tuple[LikeLlama, Path, Reference]
_made: dict[str, Made] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return the files of the case of this name, made once."""
    name = request.param
    if name not in _made:
        folder = tmp_path_factory.mktemp(name)
        _made[name] = (BY_NAME[name], folder, make(BY_NAME[name], folder))
    return _made[name]


@pytest.mark.parametrize(("made", "form"), FORMS, indirect=["made"])
def test_log_probabilities_are_those_of_an_equal_model(made: Made, form: str) -> None:
    case, folder, found = made
    job = score(case.same, files_of(case, form, folder), found, "float32")
    assert differences(job, found).max() <= EXACT
    assert job.token_ids == found.token_ids


@pytest.mark.parametrize("made", ROUNDED, indirect=True)
def test_default_arithmetic_stays_close(made: Made) -> None:
    case, folder, found = made
    apart = differences(score(case.same, files_of(case, "q8_0", folder), found, "auto"), found)
    assert np.median(apart) <= LOOSE


@pytest.mark.parametrize(
    ("made", "changes", "reason"),
    [
        ("internlm2", {"attention.scale": 0.5}, "attention.scale"),
        ("internlm2", {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "type 'dynamic'"),
        ("minicpm", {"residual_scale": float("nan")}, "residual_factor must be positive"),
        ("minicpm", {"logit_scale": -4.0}, "logits_scale must be positive"),
        ("minicpm", {"embedding_scale": "12"}, "must be a number"),
        ("refact", {"attention.max_alibi_bias": 4.0}, "attention.max_alibi_bias"),
        ("refact", {"attention.head_count": 0}, "must be in 1"),
        ("deepseek", {"expert_gating_func": 2}, "expert_gating_func"),
        ("deepseek", {"expert_used_count": 9}, "must be 1..8"),
        ("deepseek", {"expert_shared_count": None}, "lacks `expert_shared_count`"),
    ],
    indirect=["made"],
)
def test_a_file_that_says_something_else_is_refused(
    made: Made, changes: Mapping[str, Any], reason: str
) -> None:
    check_refused(made, changes, reason)


@pytest.mark.models
@pytest.mark.parametrize(
    ("made", "changes", "reason"),
    [
        ("baichuan-7b", {"block_count": 33}, "32 layers, which have rotary positions, or 40"),
        ("qwen", {"feed_forward_length": 383}, "must be even"),
        ("orion", {"rope.scaling.attn_factor": "1"}, "must be a number"),
        ("starcoder", {"rope.freq_base": 10000.0}, "rope.freq_base"),
        ("jais2", {"attention.layer_norm_epsilon": 0.0}, "norm_eps must be positive"),
        ("dbrx", {"attention.clamp_kqv": -1.0}, "must be positive"),
        ("dbrx", {"expert_used_count": 0}, "must be 1..8"),
    ],
    indirect=["made"],
)
def test_further_files_that_say_something_else_are_refused(
    made: Made, changes: Mapping[str, Any], reason: str
) -> None:
    check_refused(made, changes, reason)


def check_refused(made: Made, changes: Mapping[str, Any], reason: str) -> None:
    case, folder, _ = made
    with GgufFile.open(files_of(case, "f32", folder).path) as file:
        metadata, tensors = dict(file.metadata), frozenset(file.tensors)
    read_gguf(metadata, tensors)
    prefix = metadata["general.architecture"]
    metadata |= {f"{prefix}.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelLoadError, match=reason):
        read_gguf(metadata, tensors)


@pytest.mark.parametrize("made", ["minicpm"], indirect=True)
def test_factors_that_the_first_files_of_minicpm_lack_are_those_of_its_2b(made: Made) -> None:
    case, folder, _ = made
    with GgufFile.open(files_of(case, "f32", folder).path) as file:
        metadata = {key: value for key, value in file.metadata.items() if not key.endswith("_scale")}
        _, config = read_gguf(metadata, frozenset(file.tensors))
    assert config.embedding_factor == 12.0
    assert config.residual_factor == pytest.approx(1.4 / 3**0.5)
    assert config.logits_scale == pytest.approx(256 / 128)


@pytest.mark.parametrize(
    "architecture", sorted({case.architecture for case in LIKE_LLAMA if not case.is_read})
)
def test_their_checkpoints_are_left_to_other_code(architecture: str) -> None:
    assert not is_native({"architectures": [architecture], "model_type": "any"})


def test_files_of_xverse_are_refused_for_their_vocabulary() -> None:
    with pytest.raises(ModelLoadError, match="do not say how text becomes tokens"):
        read_gguf({"general.architecture": "xverse"}, frozenset())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("internlm2", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "type 'ntk' is not supported"),
        ("internlm", {"rotary": {"base": 10000, "type": "linear"}}, "`rotary` of type 'linear'"),
        ("internlm", {"rotary": 5}, "`rotary` must be an object"),
        ("minicpm", {"scale_depth": 0}, "residual_factor must be positive"),
        ("minicpm", {"scale_width": 8}, "scale_width"),
        ("minicpm-experts", {"num_experts_per_tok": 9}, "must be 1..8"),
        ("baichuan-13b", {"num_hidden_layers": 41}, "32 layers, which have rotary positions, or 40"),
        ("orion", {"hidden_act": "silly"}, "'silly' is not supported"),
        ("qwen", {"visual": {"layers": 48}}, "visual"),
        ("qwen", {"no_bias": False}, "no_bias"),
        ("qwen", {"intermediate_size": 383}, "intermediate_size must be even"),
        ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek", {"moe_layer_freq": 0}, "moe_layer_freq must be positive"),
        ("chatglm", {"position_encoding_2d": True}, "ChatGLM 1 has positions in two dimensions"),
        ("chatglm", {"rmsnorm": False}, "rmsnorm"),
        ("chatglm", {"padded_vocab_size": 65024}, "rope_ratio 50: ChatGLM 2 divides positions by it"),
        ("chatglm", {"original_rope": False}, "original_rope"),
        ("chatglm", {"quantization_bit": 4}, "quantization_bit"),
        ("chatglm", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        ("chatglm", {"multi_query_group_num": 3}, "must be a multiple of num_kv_heads"),
    ],
)
def test_a_config_that_says_something_else_is_refused(
    name: str, changes: Mapping[str, Any], reason: str
) -> None:
    config = with_architecture(BY_NAME[name].published)
    read_config(config)
    with pytest.raises(ModelLoadError, match=reason):
        read_config({**config, **changes})


@pytest.mark.parametrize(("changes", "dense"), [({}, [0]), ({"moe_layer_freq": 2}, [0, 1])])
def test_layers_without_experts_are_those_of_the_config(changes: Mapping[str, Any], dense: list[int]) -> None:
    _, config = read_config({**BY_NAME["deepseek"].published, **changes})
    assert [index for index, layer in enumerate(config.layers) if layer.experts is None] == dense


def test_contexts_are_those_of_the_training() -> None:
    for name, longest in (("qwen", 256), ("chatglm", 256), ("baichuan-13b", 256)):
        _, config = read_config(with_architecture(BY_NAME[name].published))
        assert (config.context_length, config.longest_context) == (256, longest)


@pytest.mark.parametrize(
    ("head", "ulp"), [(torch.float32, 1e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)]
)
def test_rows_of_baichuan_2_s_head_are_scaled_as_by_its_code(
    head: torch.dtype, ulp: float, tmp_path: Path
) -> None:
    weight = torch.randn(5000, 64).to(head)
    weight[7] = 0
    safetensors.torch.save_file({"lm_head.weight": weight}, tmp_path / "model.safetensors")
    expected = torch.nn.functional.normalize(weight.float()).to(head)
    source = SafetensorsWeights(tmp_path).get("lm_head.weight", (5000, 64))
    rows = np.concatenate([ops.decode(each) for each in unit_rows(source)])
    np.testing.assert_allclose(rows, expected.float().numpy(), rtol=ulp)
    assert ulp == 1e-6 or (rows == expected.float().numpy()).mean() > 0.999


def test_exaone_runs_by_the_code_of_transformers_if_asked(tmp_path: Path) -> None:
    case = BY_NAME["exaone"]
    found = make(replace(case, same=replace(case.same, gguf=())), tmp_path)
    with OpenModel(files_of(case, "safetensors", tmp_path), model_impl="transformers") as opened:
        assert opened.is_generic and opened.config.architecture == "LlamaForCausalLM"
    with OpenModel(files_of(case, "safetensors", tmp_path), model_impl="auto") as opened:
        assert not opened.is_generic and opened.config.architecture == "ExaoneForCausalLM"
    assert len(found.token_ids) == 1
