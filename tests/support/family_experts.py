"""Families with routed experts that are compared with `transformers`, as cases of `families`.

Routers choose each token's experts clearly (`family_maker`); choice corrections and sinks are not zero.
"""

from __future__ import annotations

from functools import partial

from tests.support.family_case import FamilyCase, Fault, case_of

_ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "ernie_moe": "Ernie4_5_MoeForCausalLM",
    "hunyuan_moe": "HunYuanMoEV1ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}

_case = partial(case_of, _ARCHITECTURES)


def _size_of(key: str, value: int) -> Fault:
    return Fault(f"other-{key}", config={key: value})


_ROPE_BASE = Fault("rope-base", config={"rope_parameters": {"rope_theta": 100.0}})
_QUERY_NORM = Fault("no-query-norm", tensors="*.q_norm.weight", change="to ones")
_VALUE_BIAS = Fault("no-value-bias", tensors="*.v_proj.bias")
_NORM_WEIGHTS = Fault("not-renormalised", config={"norm_topk_prob": False})
_RENORMALISED = Fault("renormalised", config={"norm_topk_prob": True})
_ONE_EXPERT = _size_of("num_experts_per_tok", 1)
_ROUTER = Fault("order-of-experts", tensors="*.mlp.gate.weight", change="swap halves")
_LAST_EXPERT = Fault("a-missing-expert", tensors="*.experts.3.down_proj.weight")
_SHARED = Fault("no-shared-expert", tensors="*.shared_experts.down_proj.weight")
_CORRECTION = Fault("no-correction", tensors="*.e_score_correction_bias")
_SCALING = Fault("no-scaling", config={"routed_scaling_factor": 1.0})
_SMALL = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_CORRECTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
}
_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
_OTHER_GROUPS = Fault("other-groups", config={"topk_group": 4})
_GRANITE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.35,
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 32,
    }
}  # fmt: skip

# Stretched four times: sqrt(1 + ln(4) / ln(64)).
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * index for index in range(16)],
    "long_factor": [1.0 + 0.5 * index for index in range(16)],
    "short_mscale": (4 / 3) ** 0.5,
    "long_mscale": (4 / 3) ** 0.5,
    "original_max_position_embeddings": 64,
}
_MSCALE = Fault("other-mscale", config={"rope_parameters": {"short_mscale": 1.0, "long_mscale": 1.0}})

EXPERT_CASES: tuple[FamilyCase, ...] = (
    _case(
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        faults=(
            _ONE_EXPERT,
            _ROPE_BASE,
            Fault("order-of-experts", tensors="*.block_sparse_moe.gate.weight", change="swap halves"),
            Fault("a-missing-expert", tensors="*.experts.3.w2.weight"),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "mixtral-fused", {"num_local_experts": 4, "num_experts_per_tok": 3}, faults=(), gguf=(), is_fused=True
    ),
    _case(
        "qwen2_moe",
        {**_SMALL, "shared_expert_intermediate_size": 96},
        faults=(
            _RENORMALISED,
            _ROUTER,
            _LAST_EXPERT,
            _VALUE_BIAS,
            Fault("no-shared-expert", tensors="*.shared_expert.down_proj.weight"),
            Fault("an-open-gate", tensors="*.shared_expert_gate.weight"),
        ),
        gguf=("f32", "bf16"),
    ),
    _case(
        "qwen2_moe-dense-layers",
        {**_SMALL, "shared_expert_intermediate_size": 96, "mlp_only_layers": [1], "norm_topk_prob": True},
        faults=(_NORM_WEIGHTS,),
        gguf=(),
    ),
    _case(
        "qwen2_moe-steps-fused",
        {**_SMALL, "shared_expert_intermediate_size": 96, "decoder_sparse_step": 2},
        faults=(_RENORMALISED,),
        gguf=(),
        is_fused=True,
    ),
    _case(
        "qwen3_moe",
        {**_SMALL, "head_dim": 32, "norm_topk_prob": True},
        faults=(_NORM_WEIGHTS, _ROUTER, _LAST_EXPERT, _QUERY_NORM),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "qwen3_moe-window",
        {**_SMALL, "head_dim": 32, "use_sliding_window": True, "sliding_window": 12},
        faults=(Fault("window-off-by-one", config={"sliding_window": 13}), _RENORMALISED),
        gguf=(),
        dtype="bfloat16",
    ),
    _case(
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3},
        faults=(_RENORMALISED, _ROUTER, _LAST_EXPERT, _QUERY_NORM),
        gguf=("f32", "f16"),
    ),
    _case(
        "phimoe",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.1,
        },
        faults=(
            Fault("no-jitter", config={"router_jitter_noise": 0.0}),
            Fault("no-norm-bias", tensors="*.input_layernorm.bias"),
            Fault("no-head-bias", tensors="lm_head.bias"),
            Fault("order-of-experts", tensors="*.block_sparse_moe.gate.weight", change="swap halves"),
        ),
        gguf=(),
    ),
    _case(  # the GGUF lacks the jitter and the factor of the cosines, here the usual ones
        "phimoe-longrope",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": _LONGROPE,
        },
        faults=(_VALUE_BIAS, _MSCALE),
        gguf=("f32",),
        json={"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 64},
        max_total_tokens=64,
    ),
    _case(
        "granitemoe",
        _GRANITE,
        faults=(
            Fault("residual_multiplier", config={"residual_multiplier": 1.0}),
            Fault("order-of-experts", tensors="*.router.layer.weight", change="swap halves"),
            Fault("order-of-gate_up", tensors="*.output_linear.weight", change="swap halves"),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "granitemoeshared",
        {**_GRANITE, "shared_intermediate_size": 96},
        faults=(
            Fault("no-shared-expert", tensors="*.shared_mlp.output_linear.weight"),
            Fault("order-of-gate_up", tensors="*.shared_mlp.input_linear.weight", change="swap halves"),
            _ONE_EXPERT,
        ),
        gguf=("f32",),
    ),
    _case("granitemoe-fused", _GRANITE, faults=(), gguf=(), is_fused=True),
    _case(
        "glm4_moe",
        {**_CORRECTED, "head_dim": 32, "attention_bias": True, "num_nextn_predict_layers": 0},
        faults=(_NORM_WEIGHTS, _CORRECTION, _SHARED, _SCALING, _ROUTER, _VALUE_BIAS),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "glm4_moe-norms",
        {**_CORRECTED, **_GROUPS, "head_dim": 32, "use_qk_norm": True, "num_nextn_predict_layers": 0},
        faults=(_OTHER_GROUPS, _QUERY_NORM),
        gguf=(),
    ),
    _case(
        "ernie_moe",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2},
        faults=(_size_of("moe_k", 1), _CORRECTION, _SHARED, _ROUTER, _ROPE_BASE),
        gguf=("f32", "bf16"),
    ),
    _case(
        "ernie_moe-fused",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64},
        faults=(),
        gguf=(),
        is_fused=True,
    ),
    _case(
        "ernie_moe-layers",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 64,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 2,
            "tie_word_embeddings": True,
        },
        faults=(_CORRECTION, _ONE_EXPERT),
        gguf=(),
        json={"num_experts": 8, "num_experts_per_tok": 3},
        drops=("moe_num_experts", "moe_k"),
    ),
    _case(
        "hunyuan_moe",
        {"num_experts": 8, "moe_topk": 2, "head_dim": 32},
        faults=(
            _size_of("moe_topk", 1),
            Fault("order-of-experts", tensors="*.gate.wg.weight", change="swap halves"),
            Fault("no-shared-expert", tensors="*.shared_mlp.down_proj.weight"),
            Fault("no-query-norm", tensors="*.query_layernorm.weight", change="to ones"),
        ),
        gguf=("f32", "q8_0"),
        json={"moe_topk": [2] * 3, "moe_intermediate_size": [192] * 3, "num_shared_expert": [1] * 3},
    ),
    _case(
        "hunyuan_moe-alpha",
        {
            "num_experts": 8,
            "moe_topk": 2,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 20.0},
        },
        faults=(Fault("other-alpha", config={"rope_parameters": {"alpha": 100.0}}), _ONE_EXPERT),
        gguf=(),
        json={"num_local_experts": 8, "num_experts_per_tok": 2},
        drops=("num_experts", "moe_topk"),
    ),
    _case(
        "dots1",
        {**_CORRECTED, **_GROUPS},
        faults=(_NORM_WEIGHTS, _CORRECTION, _SHARED, _SCALING, _OTHER_GROUPS, _QUERY_NORM),
        gguf=(),
    ),
    _case("dots1-gguf", _CORRECTED, faults=(_ROUTER,), gguf=("f32", "q8_0")),
    _case(
        "dots1-window",
        {**_CORRECTED, "sliding_window": 12, "max_window_layers": 1},
        faults=(Fault("window-off-by-one", config={"sliding_window": 13}),),
        gguf=(),
    ),
    _case(
        "gpt_oss",
        {**_YARN, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 12},
        faults=(
            Fault("no-sinks", tensors="*.sinks"),
            Fault("no-router-bias", tensors="*.router.bias"),
            Fault("no-gate-bias", tensors="*.gate_up_proj_bias"),
            Fault("no-down-bias", tensors="*.down_proj_bias"),
            Fault("window-off-by-one", config={"sliding_window": 13}),
            Fault("other-limit", config={"swiglu_limit": 0.5}),
            Fault("truncated", config={"rope_parameters": {"truncate": True}}),
            _ONE_EXPERT,
        ),
        gguf=("f32",),
    ),
    _case(  # as OpenAI published it, with other numbers than the class's defaults
        "gpt_oss-old-config",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 12,
            "hidden_act": "gelu",  # not read by the class
        },
        faults=(Fault("unscaled", config={"rope_scaling": {"factor": 1.0}}),),
        gguf=(),
        json={
            "rope_scaling": {**_YARN["rope_parameters"], "factor": 4.0},
            "rope_theta": 5000.0,
            "use_sliding_window": False,  # nor this
        },
        drops=("rope_parameters",),
    ),
)
