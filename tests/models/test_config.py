"""Configurations: what is read, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ModelConfig, RopeScaling

JSON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.vocab_size": 49152,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.context_length": 8192,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_both_formats_describe_one_model() -> None:
    assert ModelConfig.from_json(JSON) == ModelConfig.from_gguf(GGUF, frozenset())
    assert ModelConfig.from_json(JSON).head_dim == 64


def test_missing_optional_keys_take_their_defaults() -> None:
    few = {key: JSON[key] for key in JSON if key not in ("num_key_value_heads", "rope_theta", "rms_norm_eps")}
    config = ModelConfig.from_json(few)
    assert (config.num_kv_heads, config.rope_theta, config.norm_eps) == (9, 10000.0, 1e-6)


def test_rope_parameters_of_either_generation_of_transformers() -> None:
    expected = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    old = ModelConfig.from_json({**JSON, "rope_scaling": LLAMA3})
    new = ModelConfig.from_json(
        {**JSON, "rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    )
    assert old.rope_scaling == new.rope_scaling == expected
    assert (old.rope_theta, new.rope_theta) == (100000.0, 500000.0)


def test_linear_scaling_by_its_old_key() -> None:
    config = ModelConfig.from_json({**JSON, "rope_scaling": {"type": "linear", "factor": 2}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({}, None),
    ],
)
def test_gguf_scaling_is_linear_unless_said_otherwise(
    keys: dict[str, Any], expected: RopeScaling | None
) -> None:
    named = {f"llama.{key}": value for key, value in keys.items()}
    assert ModelConfig.from_gguf({**GGUF, **named}, frozenset()).rope_scaling == expected


def test_a_sliding_window_bounds_what_needs_no_window() -> None:
    mistral = {**JSON, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    config = ModelConfig.from_json(mistral)
    assert (config.context_length, config.sliding_window, config.plain_length) == (8192, 4096, 4096)
    for window in (None, 8192, 9000):
        config = ModelConfig.from_json({**mistral, "sliding_window": window})
        assert (config.sliding_window, config.plain_length) == (None, 8192)
    named = {**GGUF, "llama.attention.sliding_window": 4096}
    assert ModelConfig.from_gguf(named, frozenset()).sliding_window == 4096


@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(("is_used", "expected"), [(True, 4096), (False, 8192), (None, 8192)])
def test_a_window_of_qwen_bounds_the_context_where_it_is_used(
    family: str, is_used: bool | None, expected: int
) -> None:
    used = {} if is_used is None else {"use_sliding_window": is_used}
    config = ModelConfig.from_json({**JSON, "architectures": [family], "sliding_window": 4096, **used})
    assert (config.context_length, config.sliding_window) == (expected, None), "not all layers have it"


@pytest.mark.parametrize(
    ("architecture", "attention_bias", "expected"),
    [
        ("LlamaForCausalLM", True, (True, True)),
        ("LlamaForCausalLM", False, (False, False)),
        ("Qwen2ForCausalLM", False, (True, False)),
        ("MistralForCausalLM", True, (False, False)),
        ("Qwen3ForCausalLM", False, (False, False)),
        ("Qwen3ForCausalLM", True, (True, True)),
    ],
)
def test_which_products_have_biases(
    architecture: str, attention_bias: bool, expected: tuple[bool, bool]
) -> None:
    config = ModelConfig.from_json(
        {**JSON, "architectures": [architecture], "attention_bias": attention_bias}
    )
    assert (config.has_qkv_bias, config.has_output_bias) == expected


def test_gguf_biases_and_head_show_by_their_tensors() -> None:
    config = ModelConfig.from_gguf(GGUF, frozenset({"blk.0.attn_q.bias", "output.weight"}))
    assert config.has_qkv_bias and not config.has_output_bias and not config.has_tied_embeddings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BertModel"]}, "BertModel.*supported are LlamaForCausalLM"),
        ({"architectures": None}, "names no architecture"),
        ({"hidden_act": "gelu"}, "gelu.*only silu"),
        ({"vocab_size": 1 << 40}, "vocab_size must be an integer in"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"hidden_size": "576"}, "hidden_size"),
        ({"hidden_size": None}, "lacks `hidden_size`"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_key_value_heads": 2}, "multiple of num_kv_heads"),
        ({"head_dim": 40}, "multiple of 16"),
        ({"sliding_window": -5}, "sliding_window must be positive"),
        ({"head_dim": 512}, "head_dim"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "lacks `factor`"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}}, "original_max"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_json_that_cannot_be_served_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        ModelConfig.from_json({**JSON, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gemma"}, "'gemma'.*supported are llama, qwen2, qwen3"),
        ({"general.architecture": 3}, "names no general.architecture"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.attention.head_count_kv": [3, 3]}, "must be one integer"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ({"llama.attention.value_length": 128}, "value_length is 128"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.scaling.type": "linear"}, "lacks `rope.scaling.factor`"),
        ({"llama.context_length": 1 << 50}, "context_length"),
    ],
)
def test_gguf_that_cannot_be_served_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        ModelConfig.from_gguf({**GGUF, **change}, frozenset())
