"""Keys that a config.json lacks: families use the same defaults as the class of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading.recognise import read_config
from tgi_asgi.models.registry import all_families

# Values for classes whose own defaults do not describe a model that can be served.
_GIVEN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "glm4_moe": {"head_dim": 128},
    "falcon_h1": {"mamba_d_head": 16, "mamba_n_heads": 64},
}
_COMPOSITE = ("qwen3_5", "qwen3_5_moe")  # their keys are in a nested object
_NOT_NATIVE = ("exaone", "sarvam_mla", "sarvam_moe")  # a family's class, with defaults of their own


def _types() -> Iterator[str]:
    ours = {family.architecture for family in all_families() if not family.is_gguf_only}
    for kind, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if architecture in ours and kind not in _COMPOSITE + _NOT_NATIVE:
            yield kind


@pytest.mark.parametrize("kind", sorted(_types()))
def test_a_missing_key_means_the_default_of_transformers(kind: str) -> None:
    default = CONFIG_MAPPING[kind](**_GIVEN.get(kind, {}))
    values: dict[str, Any] = json.loads(default.to_json_string(use_diff=False))
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    whole = _read(values)
    missing = set(values) - set(_GIVEN.get(kind, {})) - {"architectures"}
    others = {}
    for key in missing:
        try:
            found = _read({name: value for name, value in values.items() if name != key})
        except ModelLoadError as error:
            assert "lacks" in str(error), (key, error)
            continue
        if found != whole:
            others[key] = values[key]
    assert not others


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("bloom", ["vocab_size", "hidden_size", "n_layer", "n_head"]),
        ("mpt", ["vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"]),
        ("hunyuan_v1_moe", ["num_experts", "moe_topk"]),
        ("lfm2_moe", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]),
    ],
)
def test_sizes_and_counts_of_experts_that_a_class_has_need_not_be_there(kind: str, keys: list[str]) -> None:
    values: dict[str, Any] = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    assert _read({key: value for key, value in values.items() if key not in keys}) == _read(values)


def _read(values: dict[str, Any]) -> ModelConfig:
    return read_config(values)[1]
