"""Cases of the families that came after Llama and differ from it in an operator or two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.family_case import BASE, FamilyCase, Fault, ignores_biases, ignores_weights


def _rope(kind: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def _changed(name: str, **config: Any) -> Fault:
    """Simulate a model with another configuration."""
    return Fault(name, config=config)


_ROPE_BASE = _changed("rope-base", rope_parameters={"rope_theta": 100.0})
_FUSED_GATE_UP = Fault("order-of-gate_up", tensors="*.gate_up_proj.weight", change="swap halves")
_RELU = _changed("relu", hidden_act="relu")
_WIDER = _changed("window-off-by-one", sliding_window=13)
_ALL_SLIDE = _changed("all-layers-slide", layer_types=["sliding_attention"] * 4)
_FOUR: dict[str, Any] = {"num_hidden_layers": 4}
_HEADS: dict[str, Any] = {"head_dim": 32}
# Norms multiply by 1 + weight, so stored ones act as factors of 2.
_GEMMA: dict[str, Any] = {**_HEADS, "tie_word_embeddings": True}
_GEMMA2: dict[str, Any] = {
    **_GEMMA,
    **_FOUR,
    "sliding_window": 12,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 30.0,
}
_GEMMA3: dict[str, Any] = {
    **_GEMMA,
    **_FOUR,
    "sliding_window": 12,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
_LAYER_NORM = ("CohereForCausalLM", "Cohere2ForCausalLM", "OlmoForCausalLM", "NemotronForCausalLM")
_COHERE: dict[str, Any] = {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "tie_word_embeddings": True}
_GRANITE4: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.35,
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
    "shared_intermediate_size": 192,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "layer_types": ["full_attention"] * 3,
    "position_embedding_type": "rope",
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
}


def _case(name: str, architecture: str, more: Mapping[str, Any] | None = None, **rest: Any) -> FamilyCase:
    config = {**BASE, **(more or {})}
    if architecture in _LAYER_NORM:
        del config["rms_norm_eps"]
    return FamilyCase(name, architecture, config, **rest)


NEWER_CASES: tuple[FamilyCase, ...] = (
    _case(
        "gemma",
        "GemmaForCausalLM",
        _GEMMA,
        faults=(ignores_weights("input_layernorm"), ignores_weights("post_attention_layernorm"), _ROPE_BASE),
        gguf=("f32", "q8_0"),
    ),
    _case(  # as in Google's first files, which say gelu and mean its tanh form
        "gemma-old-config",
        "GemmaForCausalLM",
        {**_GEMMA, "num_key_value_heads": 1},
        faults=(ignores_weights("model.norm"),),
        gguf=(),
        dtype="bfloat16",
        json={"hidden_act": "gelu", "hidden_activation": None, "rope_theta": 5000.0},
        drops=("rope_parameters", "tie_word_embeddings"),
    ),
    _case(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA2,
        faults=(
            _WIDER,
            _ALL_SLIDE,
            _changed("no-cap-of-scores", attn_logit_softcapping=None),
            _changed("no-cap-of-logits", final_logit_softcapping=None),
            ignores_weights("post_attention_layernorm"),
            ignores_weights("pre_feedforward_layernorm"),
            ignores_weights("post_feedforward_layernorm"),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "gemma2-scale",
        "Gemma2ForCausalLM",
        {**_GEMMA2, "query_pre_attn_scalar": 9, "layer_types": ["full_attention", "sliding_attention"] * 2},
        faults=(_changed("scale", query_pre_attn_scalar=32),),
        gguf=(),
    ),
    _case(
        "gemma3",
        "Gemma3ForCausalLM",
        _GEMMA3,
        faults=(
            _WIDER,
            _ALL_SLIDE,
            ignores_weights("q_norm"),
            ignores_weights("k_norm"),
            ignores_weights("post_attention_layernorm"),
            _changed("global-base", rope_parameters={"full_attention": {"rope_theta": 10000.0}}),
            _changed("local-base", rope_parameters={"sliding_attention": {"rope_theta": 100000.0}}),
            _changed("unscaled", rope_parameters={"full_attention": {"factor": 1.0}}),
        ),
        gguf=(),
    ),
    _case(  # as in the files on the Hub
        "gemma3-old-config",
        "Gemma3ForCausalLM",
        {**_GEMMA3, "num_hidden_layers": 7, "layer_types": None},
        faults=(_changed("local-base", rope_local_base_freq=100000.0),),
        dtype="bfloat16",
        json={
            "rope_theta": 100000.0,
            "rope_local_base_freq": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        drops=("rope_parameters", "layer_types", "tie_word_embeddings"),
        gguf=(),
    ),
    _case(  # llama.cpp only supports every sixth layer and a local base of 10,000
        "gemma3-six-layers",
        "Gemma3ForCausalLM",
        {**_GEMMA3, "num_hidden_layers": 6, "layer_types": None},
        faults=(_WIDER,),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "cohere",
        "CohereForCausalLM",
        _COHERE,
        faults=(
            ignores_weights("input_layernorm"),
            _ROPE_BASE,
            _changed("logit-scale", logit_scale=1.0),
            _RELU,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(  # like Command R+
        "cohere-head-norms",
        "CohereForCausalLM",
        {**_COHERE, "use_qk_norm": True, "attention_bias": True},
        faults=(
            Fault("no-query-norms", tensors="*.q_norm.weight", change="to ones"),
            Fault("order-of-key-norms", tensors="*.k_norm.weight", change="swap halves"),
            ignores_biases("o_proj"),
        ),
        json={"model_max_length": 512},
        gguf=(),
    ),
    _case(
        "cohere2",
        "Cohere2ForCausalLM",
        {**_COHERE, **_FOUR, "sliding_window": 12},
        faults=(_WIDER, _ALL_SLIDE, ignores_weights("input_layernorm"), _ROPE_BASE),
        json={"rotary_pct": 1.0, "use_gated_activation": True},
        gguf=("f32", "q8_0"),
    ),
    _case(
        "cohere2-old-config",
        "Cohere2ForCausalLM",
        {**_COHERE, **_FOUR, "sliding_window": 12, "num_key_value_heads": 4},
        faults=(ignores_weights("model.norm"),),
        json={"sliding_window_pattern": 2, "rope_theta": 5000.0},
        drops=("layer_types", "rope_parameters", "tie_word_embeddings"),
        dtype="bfloat16",
        gguf=(),
    ),
    _case(
        "olmo",
        "OlmoForCausalLM",
        {"clip_qkv": 0.75},
        faults=(
            _changed("uncut", clip_qkv=None),
            _ROPE_BASE,
            Fault("order-of-values", tensors="*.v_proj.weight", change="swap halves"),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "olmo-tied",
        "OlmoForCausalLM",
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        faults=(_ROPE_BASE,),
        dtype="bfloat16",
    ),
    _case(
        "olmo3",
        "Olmo3ForCausalLM",
        {
            **_FOUR,
            "sliding_window": 12,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        faults=(
            _WIDER,
            _ALL_SLIDE,
            ignores_weights("q_norm"),
            _changed(
                "unscaled", rope_parameters={"full_attention": {"rope_type": "default", "factor": None}}
            ),
        ),
        gguf=(),
    ),
    _case(
        "olmo3-unscaled",
        "Olmo3ForCausalLM",
        {**_FOUR, "sliding_window": 12, "rope_parameters": None, "attention_bias": True},
        faults=(ignores_biases("v_proj"), _WIDER),
        json={"rope_theta": 500000.0},
        drops=("rope_parameters", "layer_types"),
    ),
    _case(
        "glm",
        "GlmForCausalLM",
        {
            **_HEADS,
            **_rope(partial_rotary_factor=0.5),
            "attention_bias": True,
            "max_position_embeddings": 128,
        },
        faults=(
            _FUSED_GATE_UP,
            _ROPE_BASE,
            ignores_biases("q_proj"),
            _changed("all-is-rotated", rope_parameters={"partial_rotary_factor": 1.0}),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "glm-old-config",
        "GlmForCausalLM",
        {**_HEADS, **_rope(partial_rotary_factor=0.5), "attention_bias": True, "num_key_value_heads": 4},
        faults=(ignores_weights("post_attention_layernorm"),),
        json={"rope_theta": 5000.0},
        drops=("rope_parameters",),
        dtype="bfloat16",
        gguf=(),
    ),
    _case(
        "glm4",
        "Glm4ForCausalLM",
        {**_HEADS, **_rope(partial_rotary_factor=0.5), "attention_bias": False},
        faults=(
            _FUSED_GATE_UP,
            _ROPE_BASE,
            ignores_weights("post_self_attn_layernorm"),
            ignores_weights("post_attention_layernorm"),
            ignores_weights("post_mlp_layernorm"),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "glm4-biases",
        "Glm4ForCausalLM",
        {**_HEADS, **_rope(partial_rotary_factor=0.25), "attention_bias": True, "tie_word_embeddings": True},
        faults=(ignores_biases("k_proj"),),
    ),
    _case(
        "exaone4",
        "Exaone4ForCausalLM",
        {**_FOUR, "sliding_window": 12, "sliding_window_pattern": 4},
        faults=(
            _WIDER,
            _ALL_SLIDE,
            ignores_weights("q_norm"),
            ignores_weights("post_attention_layernorm"),
            ignores_weights("post_feedforward_layernorm"),
            _ROPE_BASE,
        ),
        gguf=(),  # llama.cpp only supports windows for the 32B's 64 layers
    ),
    _case(  # like 1.2B
        "exaone4-full",
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
        faults=(ignores_weights("k_norm"), _ROPE_BASE),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "exaone4-old-config",
        "Exaone4ForCausalLM",
        {**_FOUR, "sliding_window": 12, "sliding_window_pattern": 4, **_HEADS},
        faults=(_WIDER,),
        json={
            "sliding_window_pattern": "LLLG",
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_theta": 5000.0,
        },
        drops=("rope_parameters",),
        dtype="bfloat16",
        gguf=(),
    ),
    _case(
        "hunyuan",
        "HunYuanDenseV1ForCausalLM",
        {**_HEADS, "attention_bias": True},
        faults=(
            ignores_weights("query_layernorm"),
            ignores_weights("key_layernorm"),
            _ROPE_BASE,
            ignores_biases("q_proj"),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "hunyuan-alpha",
        "HunYuanDenseV1ForCausalLM",
        {**_HEADS, **_rope("dynamic", alpha=50.0, factor=1.0), "tie_word_embeddings": True},
        faults=(_changed("alpha", rope_parameters={"alpha": 5.0}),),
        gguf=(),  # the converter only accepts Tencent's own context length
    ),
    _case(
        "arcee",
        "ArceeForCausalLM",
        faults=(_RELU, _ROPE_BASE, ignores_weights("input_layernorm")),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "arcee-biases",
        "ArceeForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        faults=(ignores_biases("up_proj"), ignores_biases("down_proj"), ignores_biases("k_proj")),
        dtype="bfloat16",
    ),
    _case(
        "nemotron",
        "NemotronForCausalLM",
        {**_HEADS, **_rope(partial_rotary_factor=0.5), "norm_eps": 1e-5},
        faults=(
            ignores_weights("input_layernorm"),
            ignores_biases("post_attention_layernorm"),
            _ROPE_BASE,
            _changed("all-is-rotated", rope_parameters={"partial_rotary_factor": 1.0}),
            _RELU,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "nemotron-old-config",
        "NemotronForCausalLM",
        {**_rope(partial_rotary_factor=0.5), "attention_bias": True, "mlp_bias": True},
        faults=(ignores_biases("o_proj"), ignores_biases("up_proj")),
        json={"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        drops=("rope_parameters", "head_dim"),
        dtype="bfloat16",
        gguf=(),
    ),
    _case(  # transformers' implementation is Llama's
        "internlm3",
        "LlamaForCausalLM",
        {**_HEADS, "hidden_size": 96},
        json={
            "architectures": ["InternLM3ForCausalLM"],
            "model_type": "internlm3",
            "qkv_bias": False,
            "bias": False,
            "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 10000.0},
        },
        drops=("attention_bias", "mlp_bias"),
        faults=(_ROPE_BASE, ignores_weights("input_layernorm"), _RELU),
        gguf=(),
    ),
    _case(
        "internlm3-biases",
        "LlamaForCausalLM",
        {**_HEADS, "attention_bias": True, "mlp_bias": True},
        json={
            "architectures": ["InternLM3ForCausalLM"],
            "model_type": "internlm3",
            "qkv_bias": True,
            "bias": True,
        },
        drops=("attention_bias", "mlp_bias"),
        faults=(ignores_biases("q_proj"), ignores_biases("down_proj")),
    ),
    _case(
        "apertus",
        "ApertusForCausalLM",
        {},
        faults=(
            ignores_weights("attention_layernorm"),
            ignores_weights("feedforward_layernorm"),
            ignores_weights("q_norm"),
            Fault("alpha_p", tensors="*.act_fn.alpha_p", change="to ones"),
            Fault("alpha_n", tensors="*.act_fn.alpha_n", change="to ones"),
            _ROPE_BASE,
        ),
    ),
    _case(
        "apertus-llama3",
        "ApertusForCausalLM",
        {
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
            "attention_bias": True,
        },
        faults=(ignores_biases("k_proj"), _changed("unscaled", rope_parameters={"rope_type": "default"})),
        dtype="bfloat16",
    ),
    _case(
        "granite4",
        "GraniteMoeHybridForCausalLM",
        _GRANITE4,
        faults=(
            Fault("order-of-gate_up", tensors="*.input_linear.weight", change="swap halves"),
            _changed("residual_multiplier", residual_multiplier=1.0),
            _changed("attention_multiplier", attention_multiplier=0.17677669),
            _changed("no-positions", position_embedding_type=None),
            ignores_weights("input_layernorm"),
        ),
        json={"layer_types": ["attention"] * 3},
    ),
    _case(
        "granite4-no-positions",
        "GraniteMoeHybridForCausalLM",
        {**_GRANITE4, "position_embedding_type": None, "tie_word_embeddings": True},
        faults=(ignores_weights("post_attention_layernorm"),),
        dtype="bfloat16",
        gguf=(),
    ),
)
