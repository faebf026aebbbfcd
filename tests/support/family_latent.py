"""Families with latent attention (MLA) that are compared with `transformers`, as cases of `families`.

Heads have different numbers of unrotated, rotated and value dims, so that no two can be confused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.family_case import FamilyCase, Fault, case_of

_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
}


def _case(name: str, config: Mapping[str, Any] | None = None, **more: Any) -> FamilyCase:
    return case_of(_ARCHITECTURES, name, {"num_key_value_heads": 4, **_HEADS, **(config or {})}, **more)


_HEADS = {
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 96,
}
_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_CORRECTED = {**_EXPERTS, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "norm_topk_prob": True}
_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 0.707,
    }
}  # fmt: skip

_ROPE_BASE = Fault("rope-base", config={"rope_parameters": {"rope_theta": 100.0}})
_QUERY_NORM = Fault("no-query-norm", tensors="*.q_a_layernorm.weight", change="to ones")
_LATENT_NORM = Fault("no-latent-norm", tensors="*.kv_a_layernorm.weight", change="to ones")
_TURNING = Fault("order-of-latents", tensors="*.kv_a_proj_with_mqa.weight", change="swap halves")
_UPS = Fault("order-of-heads", tensors="*.kv_b_proj.weight", change="swap halves")
_HALVES = Fault("halves-turn", config={"rope_interleave": False})
_MSCALE = Fault("no-magnitude", config={"rope_parameters": {"mscale": 0.0, "mscale_all_dim": 0.0}})
_SCORES = Fault("other-magnitude", config={"rope_parameters": {"mscale": 1.4, "mscale_all_dim": 1.4}})
_ROUTER = Fault("order-of-experts", tensors="*.mlp.gate.weight", change="swap halves")
_SHARED = Fault("no-shared-expert", tensors="*.shared_experts.down_proj.weight")
_SCALING = Fault("no-scaling", config={"routed_scaling_factor": 1.0})
_CORRECTION = Fault("no-correction", tensors="*.e_score_correction_bias")
_OTHER_GROUPS = Fault("other-groups", config={"topk_group": 4})
_WEIGHTS = Fault("not-renormalised", config={"norm_topk_prob": False})
_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}  # as published; llama.cpp reads it

LATENT_CASES: tuple[FamilyCase, ...] = (
    _case(
        "deepseek_v2",
        {**_EXPERTS, **_YARN, "routed_scaling_factor": 2.0},
        faults=(_ROPE_BASE, _QUERY_NORM, _LATENT_NORM, _TURNING, _UPS, _MSCALE, _SCORES, _ROUTER, _SHARED),
        rounded=("q8_0",),  # the file stores each head's key matrix transposed
        json={"scoring_func": "softmax"},
    ),
    _case(
        "deepseek_v2-lite-biases",
        {
            **_EXPERTS,
            **_GROUPS,
            "q_lora_rank": None,
            "attention_bias": True,
            "routed_scaling_factor": 3.0,
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 0,
        },
        faults=(
            _OTHER_GROUPS,
            _SCALING,
            Fault("greedy", config={"topk_method": "greedy"}),
            Fault("no-latent-bias", tensors="*.kv_a_proj_with_mqa.bias"),
            Fault("no-output-bias", tensors="*.o_proj.bias"),
        ),
        gguf=(),
    ),
    _case(
        "deepseek_v2-lite",
        {**_EXPERTS, "q_lora_rank": None, "kv_lora_rank": 256, "qk_nope_head_dim": 128},
        faults=(_ROPE_BASE,),
        gguf=("f32", "bf16"),
        json={"scoring_func": "softmax"},
    ),
    _case(
        "deepseek_v3",
        {**_CORRECTED, **_GROUPS, **_YARN},
        faults=(_HALVES, _CORRECTION, _OTHER_GROUPS, _SCALING, _WEIGHTS, _MSCALE, _TURNING, _ROUTER),
        rounded=("q8_0",),  # the file stores each head's key matrix transposed
        json=_SIGMOID,
    ),
    _case(
        "deepseek_v3-halves",
        {**_CORRECTED, "q_lora_rank": None, "rope_interleave": False},
        faults=(Fault("neighbours-turn", config={"rope_interleave": True}), _LATENT_NORM),
        gguf=(),
        dtype="bfloat16",
        is_fused=True,
    ),
    _case(
        "glm4_moe_lite",
        {**_CORRECTED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        faults=(_CORRECTION, _SHARED, _SCALING, _WEIGHTS, _HALVES, _UPS),
        rounded=("q8_0",),  # the file stores each head's key matrix transposed
        json=_SIGMOID,
    ),
    _case(
        "glm4_moe_lite-layers",
        {
            **_CORRECTED,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rms_norm_eps": 0.05,  # not of the norms of latents
        },
        faults=(_ROPE_BASE, Fault("other-eps", config={"rms_norm_eps": 1e-6})),
        gguf=(),
    ),
    _case(  # llama.cpp assumes the published model's factors instead of reading them
        "minicpm3",
        {"hidden_size": 384, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "v_head_dim": 96},
        faults=(
            Fault("scale_emb", config={"scale_emb": 1}),
            Fault("scale_depth", config={"scale_depth": 0.7}),
            Fault("dim_model_base", config={"dim_model_base": 384}),
            _LATENT_NORM,
            _TURNING,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "minicpm3-longrope",
        {
            "scale_emb": 3,
            "scale_depth": None,
            "dim_model_base": None,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 16,
                "long_factor": [1.0 + 0.5 * index for index in range(16)],
            },
        },
        faults=(Fault("long-factors", config={"rope_parameters": {"long_factor": [1.0] * 16}}),),
        gguf=(),
    ),
)
