"""Configurations: what is read, and what is refused by name."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING

from tests.support.families import CASES
from tgi_asgi.errors import ModelLoadError, NotInFamily
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.layer_spec import RopeScaling, RopeSpec
from tgi_asgi.models.loading.recognise import read_config, read_gguf

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


def test_the_first_gguf_files_of_gemma2_lack_its_caps() -> None:
    """llama.cpp takes the model's own; without them, logits would be about half as large again."""
    config = of_gguf({**gguf_of("gemma2"), "gemma2.attention.key_length": 64}, frozenset())
    assert config.logits_cap == 30.0
    assert {layer.soft_cap for layer in config.layers} == {50.0}


DYNAMIC = {"rope_type": "dynamic", "alpha": 1000.0}  # Hunyuan's
ONE_OF_EACH = {case.served_as: case for case in reversed(CASES)}
ODD: tuple[Any, ...] = (-1, 0, "", "x", [[1]], {}, 10**400)


def of_json(config: dict[str, Any]) -> ModelConfig:
    return read_config(config)[1]


def of_gguf(metadata: dict[str, Any], tensors: frozenset[str]) -> ModelConfig:
    return read_gguf(metadata, tensors)[1]


def gguf_of(architecture: str) -> dict[str, Any]:
    """Return `GGUF` as a file of another architecture."""
    named = {key.replace("llama.", f"{architecture}."): value for key, value in GGUF.items()}
    return {**named, "general.architecture": architecture}


def rope_of(config: ModelConfig) -> RopeSpec:
    """Return the rotary embedding, which all layers share."""
    (rope,) = {layer.rope for layer in config.layers}
    assert rope is not None
    return rope


def windows_of(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_both_formats_describe_one_model() -> None:
    assert of_json(JSON) == of_gguf(GGUF, frozenset())
    assert of_json(JSON).head_dim == 64


def test_missing_optional_keys_take_their_defaults() -> None:
    few = {key: JSON[key] for key in JSON if key not in ("num_key_value_heads", "rope_theta", "rms_norm_eps")}
    config = of_json(few)
    assert (config.num_kv_heads, rope_of(config).theta, config.norm_eps) == (9, 10000.0, 1e-6)


def test_rope_parameters_of_either_generation_of_transformers() -> None:
    expected = RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    old = of_json({**JSON, "rope_scaling": LLAMA3})
    new = of_json({**JSON, "rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert rope_of(old).scaling == rope_of(new).scaling == expected
    assert (rope_of(old).theta, rope_of(new).theta) == (100000.0, 500000.0)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e5}),
        ("llama", {"original_max_position_embeddings": 32}),
        ("phi3", {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 64}}),
        ("gpt_oss", {}),
        ("gpt_oss", {"rope_theta": 7e5}),
        ("gpt_oss", {"rope_scaling": None, "rope_parameters": None, "rope_theta": 7e5}),
        ("ministral3", {}),
        ("ministral3", {"rope_scaling": None, "rope_theta": 7e5}),
        ("apertus", {}),
        ("apertus", {"rope_scaling": {}, "rope_theta": 7e5}),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "factor": 2.0}}}),
        ("olmo3", {"rope_theta": 7e5}),
    ],
)
def test_which_of_several_rope_keys_counts(name: str, given: dict[str, Any]) -> None:
    """Check a rope_scaling beside other keys, or beside a class's own default, with `transformers`."""
    config: dict[str, Any] = {key: value for key, value in JSON.items() if key != "rope_theta"}
    config |= {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    config |= {"num_hidden_layers": 6, "num_key_value_heads": 3, **given}
    names = {"gpt_oss": "GptOss", "ministral3": "Ministral3", "gemma3_text": "Gemma3", "olmo3": "Olmo3"}
    config["architectures"] = [f"{names.get(name, name.title())}ForCausalLM"]
    config |= {"hidden_act": {"apertus": "xielu", "gemma3_text": "gelu_pytorch_tanh"}.get(name, "silu")}
    ours = next(layer.rope for layer in of_json(config).layers if layer.window is None)
    made = CONFIG_MAPPING[name](**copy.deepcopy(config))
    made.standardize_rope_params()  # as a model's rotary embedding does, with all keys set
    theirs = made.rope_parameters.get("full_attention", made.rope_parameters)
    assert ours is not None and ours.theta == theirs["rope_theta"]
    scaling = ours.scaling or RopeScaling("default")
    assert (scaling.kind, scaling.factor, scaling.original_context) == (
        theirs["rope_type"],
        theirs.get("factor", scaling.factor),
        theirs["original_max_position_embeddings"],
    )


def test_linear_scaling_by_its_old_key() -> None:
    config = of_json({**JSON, "rope_scaling": {"type": "linear", "factor": 2}})
    assert rope_of(config).scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.attn_factor": 1.5}, RopeScaling("linear", attention_factor=1.5)),
        (
            {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5},
            RopeScaling("linear", 4.0, attention_factor=1.5),
        ),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({}, None),
    ],
)
def test_gguf_scaling_is_linear_unless_said_otherwise(
    keys: dict[str, Any], expected: RopeScaling | None
) -> None:
    named = {f"llama.{key}": value for key, value in keys.items()}
    assert rope_of(of_gguf({**GGUF, **named}, frozenset())).scaling == expected


@pytest.mark.parametrize(
    ("keys", "magnitude"),
    [
        ({}, 1.1386),
        ({"attn_factor": 1.0}, 1.1386),
        ({"attn_factor": 2.0}, 2.2773),
        ({"yarn_attn_factor": 0.878, "yarn_ext_factor": 0.5}, 1.1386),
    ],
)
def test_the_magnitude_of_a_gguf_file_s_yarn_is_a_factor_of_its_own(
    keys: dict[str, float], magnitude: float
) -> None:
    given = {"type": "yarn", "factor": 4.0, **keys}
    named = {f"llama.rope.scaling.{key}": value for key, value in given.items()}
    scaling = rope_of(of_gguf({**GGUF, **named}, frozenset())).scaling
    assert scaling is not None and scaling.attention_factor == pytest.approx(magnitude, abs=1e-4)


@pytest.mark.parametrize(
    ("keys", "magnitude"),
    [
        ({}, 1.1386),
        ({"attn_factor": 0.8782488562869419}, 1.0),
        ({"attention_factor": 0.5, "attn_factor": 3.0}, 0.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, 1.1218),
    ],
)
def test_the_magnitude_of_yarn(keys: dict[str, float], magnitude: float) -> None:
    scaling = rope_of(of_json({**JSON, "rope_scaling": {"type": "yarn", "factor": 4.0, **keys}})).scaling
    assert scaling is not None and scaling.attention_factor == pytest.approx(magnitude, abs=1e-4)


def test_granite_s_gguf_file_may_switch_positions_off() -> None:
    experts = {"granitemoe.expert_count": 8, "granitemoe.expert_used_count": 2}
    for flag in (True, False):
        config = of_gguf({**gguf_of("granite"), "granite.rope.scaling.finetuned": flag}, frozenset())
        assert {layer.rope is not None for layer in config.layers} == {flag}
        # llama.cpp does not read the key in files with experts.
        named = {**gguf_of("granitemoe"), **experts, "granitemoe.rope.scaling.finetuned": flag}
        assert None not in {layer.rope for layer in of_gguf(named, frozenset()).layers}


def test_what_a_family_s_configuration_class_defaults_to() -> None:
    """Check that defaults for keys that real files omit equal those of `transformers`."""
    few = {key: value for key, value in JSON.items() if key not in ("rms_norm_eps", "rope_theta")}
    few |= {"num_key_value_heads": 3}
    for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "Phi3ForCausalLM"):
        ours = of_json({**few, "architectures": [name]})
        model_type = name.removesuffix("ForCausalLM").lower()
        theirs = CONFIG_MAPPING[model_type](**{key: few[key] for key in few if key != "architectures"})
        assert ours.norm_eps == theirs.rms_norm_eps
        rope = next(layer.rope for layer in ours.layers if layer.rope is not None)
        assert rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64)
        without = {key: value for key, value in few.items() if key != "tie_word_embeddings"}
        assert of_json({**without, "architectures": [name]}).has_tied_embeddings == (name[0] == "S")


@pytest.mark.parametrize("model_type", ["glm4_moe", "dots1", "deepseek_v3"])
def test_groups_of_experts_that_are_not_given_are_those_of_transformers(model_type: str) -> None:
    sizes: dict[str, Any] = {"n_routed_experts": 32, "num_experts_per_tok": 8, "n_shared_experts": 1}
    sizes |= {"n_group": 4, "head_dim": 64}
    given = CONFIG_MAPPING[model_type](**sizes).to_dict()
    expected = given.pop("topk_group")
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    last = of_json({**given, "architectures": [name]}).layers[-1]
    assert last.experts is not None
    assert (last.experts.num_groups, last.experts.top_groups) == (4, expected)


def test_mistral_s_layers_all_have_the_window() -> None:
    mistral = {**JSON, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    config = of_json(mistral)
    assert (config.context_length, windows_of(config)) == (8192, [4096] * 30)
    assert windows_of(of_json({**mistral, "sliding_window": None})) == [None] * 30
    named = {**GGUF, "llama.attention.sliding_window": 4096}
    assert windows_of(of_gguf(named, frozenset())) == [4096] * 30


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Phi3ForCausalLM"])
def test_other_keys_of_windows_mean_nothing_where_all_layers_have_one(name: str) -> None:
    left_over = {"use_sliding_window": False, "layer_types": ["full_attention"] * 30, "max_window_layers": 3}
    assert windows_of(of_json({**JSON, "architectures": [name], "sliding_window": 64, **left_over})) == (
        [64] * 30
    )


def test_smollm3_s_window_is_of_the_layers_without_positions() -> None:
    named = {**JSON, "architectures": ["SmolLM3ForCausalLM"], "sliding_window": 64}
    assert windows_of(of_json(named)) == [None] * 30
    windows = windows_of(of_json({**named, "use_sliding_window": True}))
    assert windows == [64 if (index + 1) % 4 == 0 else None for index in range(30)]


def test_a_window_left_over_in_a_llama_s_configuration_means_nothing() -> None:
    for left_over in ({"sliding_window": 4096}, {"sliding_window": 4096, "use_sliding_window": True}):
        assert windows_of(of_json({**JSON, **left_over})) == [None] * 30


@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"use_sliding_window": True, "max_window_layers": 28}, [None] * 28 + [4096] * 2),
        ({"use_sliding_window": True}, [None] * 28 + [4096] * 2),  # transformers' default
        ({"use_sliding_window": True, "max_window_layers": 30}, [None] * 30),
        ({"use_sliding_window": True, "max_window_layers": 0}, [4096] * 30),
        ({"use_sliding_window": False, "max_window_layers": 0}, [None] * 30),
        ({"max_window_layers": 0}, [None] * 30),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 30),
        (
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 15},
            [4096, None] * 15,
        ),
    ],
)
def test_a_window_of_qwen_is_of_the_upper_layers_where_it_is_used(
    family: str, given: dict[str, Any], expected: list[int | None]
) -> None:
    config = of_json({**JSON, "architectures": [family], "sliding_window": 4096, **given})
    assert (config.context_length, windows_of(config)) == (8192, expected)


@pytest.mark.parametrize(
    ("architecture", "attention_bias", "expected"),
    [
        ("LlamaForCausalLM", True, (True, True)),
        ("LlamaForCausalLM", False, (False, False)),
        ("Qwen2ForCausalLM", False, (True, False)),
        ("MistralForCausalLM", False, (False, False)),
        ("Qwen3ForCausalLM", False, (False, False)),
        ("Qwen3ForCausalLM", True, (True, True)),
    ],
)
def test_which_products_have_biases(
    architecture: str, attention_bias: bool, expected: tuple[bool, bool]
) -> None:
    config = of_json({**JSON, "architectures": [architecture], "attention_bias": attention_bias})
    assert (config.has_qkv_bias, config.has_output_bias) == expected


def test_gguf_biases_and_head_show_by_their_tensors() -> None:
    config = of_gguf(GGUF, frozenset({"blk.0.attn_q.bias", "output.weight"}))
    assert config.has_qkv_bias and not config.has_output_bias and not config.has_tied_embeddings


@pytest.mark.parametrize("architecture", ONE_OF_EACH)
def test_any_value_of_any_key_is_read_or_refused(architecture: str) -> None:
    """Replace each value, also those in objects, by others of other types and sizes."""
    case = ONE_OF_EACH[architecture]
    made = getattr(transformers, case.architecture).config_class(**copy.deepcopy(dict(case.config)))
    config: dict[str, Any] = {**made.to_dict(), **case.json, "architectures": [architecture]}
    read_config(config)
    odd = itertools.cycle(ODD)
    changes = [{key: next(odd)} for key in [*config, "layer_types", "sliding_window"]]
    for key, value in config.items():
        if isinstance(value, dict):
            changes += [{key: {**value, inner: next(odd)}} for inner in (*value, "alpha", "factor")]
        if isinstance(value, list):
            changes += [{key: [each] * len(value)} for each in ODD]
    for change in changes:
        with contextlib.suppress(ModelLoadError):
            read_config({**config, **change})


@pytest.mark.parametrize(
    ("architecture", "given"),
    [
        ("Gemma2ForCausalLM", {"sliding_window": 4096, "sliding_window_size": 4096}),  # 9B and 27B
        ("ApertusForCausalLM", {"hidden_act": "xielu", "qk_norm": True, "post_norm": False}),
        *(
            (name, {"use_qk_norm": True, "norm_type": "rms", "use_cla": False, "cla_share_factor": 2})
            for name in ("HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM")
        ),
        ("HunYuanMoEV1ForCausalLM", {"norm_topk_prob": True}),
    ],
)
def test_keys_of_published_files_that_transformers_does_not_read_leave_the_family_in_charge(
    architecture: str, given: dict[str, Any]
) -> None:
    plain = {**JSON, "architectures": [architecture]}
    assert of_json({**plain, **given}) == of_json({**plain, "hidden_act": given.get("hidden_act")})
    for key, value in given.items():
        if type(value) is bool:
            with pytest.raises(NotInFamily, match=f"`{key}` is {not value}, only {value} is supported"):
                of_json({**plain, **given, key: not value})


def test_part_of_a_head_may_turn() -> None:
    partly = {**JSON, "architectures": ["GlmForCausalLM"], "head_dim": 64, "partial_rotary_factor": 0.5}
    assert rope_of(of_json(partly)).dim == 32
    assert rope_of(of_gguf({**GGUF, "llama.rope.dimension_count": 32}, frozenset())).dim == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BertModel"]}, "BertModel.*supported are .*LlamaForCausalLM"),
        ({"architectures": None}, "names no architecture"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported, only silu"),
        ({"hidden_act": "xielu"}, "xielu needs an MLP without a gate"),
        ({"vocab_size": 1 << 40}, "vocab_size must be an integer in"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be in 1..1024"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"hidden_size": "576"}, "hidden_size"),
        ({"hidden_size": None}, "lacks `hidden_size`"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be in 1\.\.1024"),
        (
            {"num_attention_heads": 1 << 40, "hidden_size": 1 << 41},
            r"num_attention_heads must be in 1\.\.1024",
        ),
        (
            {"max_position_embeddings": 0, "rope_scaling": {"rope_type": "yarn"}},
            "max_position_embeddings must",
        ),
        ({"num_key_value_heads": 2}, "multiple of num_kv_heads"),
        ({"head_dim": 41}, "head_dim must be even"),
        ({"head_dim": 0}, "head_dim must be positive, got 0"),
        ({"head_dim": 10**400}, "`head_dim` is larger than 2\\^53: 1000"),
        ({"architectures": ["BloomForCausalLM"], "hidden_size": 0}, "head_dim must be positive"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": -5},
            "a window must be positive, got -5",
        ),
        ({"head_dim": 514}, "head_dim"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "many"}, "rope_theta"),
        (
            {"rope_scaling": {"type": "ntk", "factor": 2}},
            "'ntk' is not supported; supported are linear, dynamic",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0.5}}, "beta_slow <= beta_fast"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "`short_factor` must be a list"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "longrope needs 32 factors, got 1",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "lacks `factor`"),
        ({"rope_scaling": {"type": "dynamic"}}, "lacks `factor`"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}, "hidden_size": 18},
            "dynamic scaling needs more than 2 rotary dims",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}}, "original_max"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "`rope_parameters` differ by kind"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": "1"}}, "`mscale` must be a number"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": -15}},
            "must not be negative",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1.0}, "rope_theta above 1"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor must be in 1..1000000, got inf"),
        ({"activation": "tanh"}, "activation 'tanh' is not supported"),
        ({"hidden_act": "silu", "activation": "gelu"}, "several activation functions"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"] * 29},
            "layer_types must be 30 of",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["chunked_attention"] * 30},
            "of full_attention, sliding_attention",
        ),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor must be in"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be in"),
        ({"partial_rotary_factor": 0.5}, "this architecture rotates whole heads"),
        (
            {"architectures": ["HunYuanDenseV1ForCausalLM"], "rope_scaling": {**DYNAMIC, "rope_theta": "x"}},
            "`rope_theta` must be a number",
        ),
        (
            {"architectures": ["HunYuanDenseV1ForCausalLM"], "rope_scaling": {**DYNAMIC, "alpha": 1e300}},
            "alpha must be positive and at most 1e6",
        ),
        ({"architectures": ["MiniCPM3ForCausalLM"], "hidden_size": 0}, "hidden_size must be positive"),
        (
            {"architectures": ["GlmForCausalLM"], "partial_rotary_factor": 0.01},
            "the rotary size must be even",
        ),
    ],
)
def test_json_that_cannot_be_served_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        of_json({**JSON, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "rwkv6"}, "'rwkv6'.*supported are .*llama, .*qwen2, .*qwen3"),
        ({"general.architecture": 3}, "names no general.architecture"),
        ({"llama.expert_count": 8}, "lacks `expert_used_count`"),
        ({"llama.attention.head_count_kv": [3, 1]}, "must be one integer"),
        ({"llama.rope.dimension_count": 65}, "the rotary size must be even"),
        ({"llama.attention.value_length": 128}, "value_length is 128"),
        ({"llama.rope.scaling.type": "yarn"}, "lacks `rope.scaling.factor`"),
        ({"llama.rope.scaling.type": "linear"}, "lacks `rope.scaling.factor`"),
        ({"llama.context_length": 1 << 50}, "context_length"),
        ({"llama.block_count": [[1], [1]]}, "must be one integer"),
        ({"tokenizer.ggml.tokens": 5, "llama.vocab_size": None}, "vocab_size"),
        # llama.cpp does not scale its logits then, and has no positions; transformers has other defaults.
        ({"general.architecture": "command-r"}, "lacks `logit_scale`"),
        ({"general.architecture": "mpt"}, "lacks `attention.max_alibi_bias`"),
        (
            {"general.architecture": "gemma3", "gemma3.rope.scaling.attn_factor": 1.7},
            "`rope.scaling.attn_factor` is 1.7",
        ),
    ],
)
def test_gguf_that_cannot_be_served_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        of_gguf({**gguf_of(change.get("general.architecture", "llama")), **change}, frozenset())
