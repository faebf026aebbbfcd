"""Cases of Gemma 4: small models share keys and values between layers, the others use keys as values."""

from __future__ import annotations

from typing import Any

from tests.support.family_case import BASE, FamilyCase, Fault, ignores_weights

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 50000.0},
}
_GEMMA4: dict[str, Any] = {
    **BASE,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 12,
    "head_dim": 32,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 32,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "rope_parameters": _ROPE,
}
_EQUAL: dict[str, Any] = {
    **_GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
}  # fmt: skip


def _changed(name: str, **config: Any) -> Fault:
    return Fault(name, config=config)


SHARED = FamilyCase(
    "gemma4-shared",
    "Gemma4ForCausalLM",
    {**_GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True},
    (
        _changed("wider", sliding_window=24),
        _changed("share", rope_parameters={"full_attention": {"partial_rotary_factor": 0.5}}),
        _changed("local-base", rope_parameters={"sliding_attention": {"rope_theta": 100.0}}),
        Fault("no-scalars", tensors="*.layer_scalar", change="to ones"),
        Fault("no-inputs", tensors="*.per_layer_projection.weight"),
        Fault("no-product-of-inputs", tensors="*.per_layer_model_projection.weight"),
        Fault("order-of-inputs", tensors="*.embed_tokens_per_layer.weight", change="swap halves"),
        ignores_weights("per_layer_projection_norm"),
        ignores_weights("post_per_layer_input_norm"),
        ignores_weights("q_norm"),
        ignores_weights("k_norm"),
    ),
    gguf=("f32", "q8_0"),
)
EXPERTS = FamilyCase(
    "gemma4-experts",
    "Gemma4ForCausalLM",
    {**_EQUAL, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 64},
    (
        Fault("no-scales-of-experts", tensors="*.router.per_expert_scale", change="to ones"),
        Fault("no-scale-of-router", tensors="*.router.scale", change="to ones"),
        Fault("no-mlp", tensors="*.mlp.down_proj.weight"),
        ignores_weights("pre_feedforward_layernorm_2"),
        ignores_weights("post_feedforward_layernorm_1"),
        ignores_weights("post_feedforward_layernorm_2"),
    ),
    gguf=("f32", "q8_0"),
)
_EQUAL_VALUES = FamilyCase(  # as published: heads of layers without a window are in keys of their own
    "gemma4-equal-values",
    "Gemma4ForCausalLM",
    {**_EQUAL, "use_bidirectional_attention": "vision"},
    (
        _changed("cap", final_logit_softcapping=2.0),
        ignores_weights("pre_feedforward_layernorm"),
        ignores_weights("post_feedforward_layernorm"),
    ),
    gguf=(),
    json={"global_head_dim": 64, "num_global_key_value_heads": 2},
    drops=("per_layer_config",),
)
GEMMA4_CASES = (SHARED, EXPERTS, _EQUAL_VALUES)
