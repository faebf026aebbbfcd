"""Families with recurrent layers that are compared with `transformers`, as cases of `families`."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from tests.support.family_case import FamilyCase, Fault, case_of

_ARCHITECTURES = {
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "granite_hybrid": "GraniteMoeHybridForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
}

_case = partial(case_of, _ARCHITECTURES)
_KINDS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]}
_LFM2 = {**_KINDS, "block_multiple_of": 32, "tie_word_embeddings": True}
_EXPERTS = {
    **_KINDS,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_dense_layers": 1,
    "tie_word_embeddings": True,
}
_TAPS = Fault("no-taps", tensors="*.conv.conv.weight", change="to ones")
_GATES = Fault("order-of-gates", tensors="*.conv.in_proj.weight", change="swap halves")
_OPERATOR_NORM = Fault("no-operator-norm", tensors="*.operator_norm.weight", change="to ones")
_QUERY_NORM = Fault("no-query-norm", tensors="*.q_layernorm.weight", change="to ones")
_LAST_NORM = Fault("no-last-norm", tensors="model.embedding_norm.weight", change="to ones")
_ROPE_BASE = Fault("rope-base", config={"rope_parameters": {"rope_theta": 100.0}})
_CONV_BIAS = Fault("no-convolution-bias", tensors="*.conv.conv.bias")
_NORM_WEIGHTS = Fault("not-renormalised", config={"norm_topk_prob": False})
_CORRECTION = Fault("no-correction", tensors="*.expert_bias")
_SCALING = Fault("no-scaling", config={"routed_scaling_factor": 1.0})
_ROUTER = Fault("order-of-experts", tensors="*.feed_forward.gate.weight", change="swap halves")
_LAST_EXPERT = Fault("a-missing-expert", tensors="*.experts.3.w2.weight")
_HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.35,
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
    "shared_intermediate_size": 96,
    "num_local_experts": 0,
    "mamba_n_heads": 8,
    "mamba_d_state": 24,
    "mamba_chunk_size": 16,
}

_PUBLISHED = {"layer_types": ["mamba", "attention", "mamba", "mamba"]}  # as llama.cpp's converter requires


def _mamba(name: str, tensor: str, change: Literal["to ones", "to zeros", "swap halves"]) -> Fault:
    return Fault(name, tensors=f"*.mamba.{tensor}", change=change)


_DECAY = _mamba("other-decay", "A_log", "to ones")
_DIRECT = _mamba("other-direct", "D", "to ones")
_STEPS = _mamba("other-steps", "dt_bias", "to ones")
_HEADS = _mamba("order-of-parts", "in_proj.weight", "swap halves")
_GATED_NORM = _mamba("no-gated-norm", "norm.weight", "to ones")
_WINDOW_BIAS = _mamba("no-convolution-bias", "conv1d.bias", "to zeros")

_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 24,
}
_DELTA_EXPERTS = {
    **_DELTA,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}


def _delta(name: str, tensor: str, change: Literal["to ones", "to zeros", "swap halves"]) -> Fault:
    return Fault(name, tensors=f"*.linear_attn.{tensor}", change=change)


_DELTA_TAPS = _delta("no-taps", "conv1d.weight", "to ones")
_DELTA_DECAY = _delta("other-decay", "A_log", "swap halves")
_DELTA_STEPS = _delta("no-bias-of-steps", "dt_bias", "to zeros")
_DELTA_NORM = _delta("no-gated-norm", "norm.weight", "to ones")
_RATES_AND_DECAYS = _delta("order-of-steps", "in_proj_ba.weight", "swap halves")
_OUTPUT_GATES = Fault("no-output-gates", tensors="*.q_proj.weight", change="swap halves")
_ZERO_CENTRED = Fault("no-input-norm", tensors="*.input_layernorm.weight", change="to zeros")
_PARTIAL = Fault("whole-heads-turn", config={"rope_parameters": {"partial_rotary_factor": 1.0}})
_SHARED_GATE = Fault("no-shared-gate", tensors="*.shared_expert_gate.weight")

_SIDE_BY_SIDE = {  # exact in Q8_0's scales, as llama.cpp multiplies them into the weights
    "num_hidden_layers": 2,
    "head_dim": 32,
    "mamba_d_ssm": 192,
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
    "mamba_chunk_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.25,
    "key_multiplier": 0.625,
    "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.75,
    "ssm_in_multiplier": 0.75,
    "ssm_out_multiplier": 0.5,
    "ssm_multipliers": [0.5, 1.5, 1.25, 0.75, 1.625],
    "mlp_multipliers": [1.75, 0.625],
}


def _factor(key: str, *, index: int | None = None) -> Fault:
    """Return the fault that a constant is 1, or the one at this index if there are several."""
    given: Any = _SIDE_BY_SIDE[key]
    if index is not None:
        changed = [1.0 if at == index else each for at, each in enumerate(given)]
    return Fault(
        f"no-{key}" if index is None else f"no-{key}-{index}", config={key: 1.0 if index is None else changed}
    )


_FACTORS = (
    *(_factor(key) for key in _SIDE_BY_SIDE if key.endswith("_multiplier")),
    *(_factor("ssm_multipliers", index=index) for index in range(5)),
    *(_factor("mlp_multipliers", index=index) for index in range(2)),
)

STATE_CASES: tuple[FamilyCase, ...] = (
    _case(
        "lfm2",
        {**_LFM2, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
        faults=(_TAPS, _GATES, _OPERATOR_NORM, _QUERY_NORM, _LAST_NORM, _ROPE_BASE),
        gguf=("f32", "q8_0"),
    ),
    _case(  # like the first files, with other names for sizes and layers
        "lfm2-old-config",
        {**_LFM2, "conv_bias": True, "conv_L_cache": 5, "hidden_size": 136, "head_dim": 34},
        faults=(_CONV_BIAS, _TAPS),
        gguf=(),
        json={"block_ff_dim": 192, "full_attn_idxs": [1], "rope_theta": 10000.0, "tie_embedding": True},
        drops=("intermediate_size", "layer_types", "rope_parameters", "tie_word_embeddings"),
    ),
    _case(
        "lfm2-plain-mlp",
        {**_LFM2, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
        faults=(Fault("other-attention", config={"rope_parameters": {"rope_theta": 300.0}}),),
        gguf=(),
        dtype="bfloat16",
    ),
    _case(
        "lfm2_moe",
        {**_EXPERTS, "routed_scaling_factor": 1.8},
        faults=(_TAPS, _GATES, _NORM_WEIGHTS, _CORRECTION, _SCALING, _ROUTER, _LAST_EXPERT),
        gguf=(),
    ),
    _case(
        "lfm2_moe-plain",
        {**_EXPERTS, "layer_types": ["conv", "full_attention", "full_attention", "conv"]},
        faults=(_TAPS, _CORRECTION),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "granite_hybrid-dense",
        {**_HYBRID, "mamba_n_groups": 2, "mamba_d_conv": 3, "tie_word_embeddings": True},
        faults=(_DECAY, _DIRECT, _STEPS, _HEADS, _GATED_NORM, _WINDOW_BIAS),
        json=_PUBLISHED,
    ),
    _case(
        "granite_hybrid-experts",
        {**_HYBRID, "num_local_experts": 8, "num_experts_per_tok": 2},
        faults=(_STEPS, _GATED_NORM),
        gguf=("f32", "q8_0"),
        json=_PUBLISHED,
    ),
    _case(
        "granite_hybrid",
        {
            **_HYBRID,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "time_step_limit": [0.2, 0.6],
        },
        faults=(
            _DECAY,
            _HEADS,
            Fault("other-limit", config={"time_step_limit": [0.0, 0.7]}),
            Fault("no-positions", config={"position_embedding_type": None}),
            Fault("order-of-experts", tensors="*.router.layer.weight", change="swap halves"),
            Fault("no-shared-expert", tensors="*.shared_mlp.output_linear.weight"),
        ),
        gguf=(),
    ),
    _case(
        "qwen3_next-dense-layer",
        {**_DELTA_EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": False, "linear_conv_kernel_dim": 3},
        faults=(_DELTA_TAPS, Fault("renormalised", config={"norm_topk_prob": True})),
        gguf=(),
        dtype="bfloat16",
    ),
    _case(
        "qwen3_next",
        _DELTA_EXPERTS,
        faults=(
            _DELTA_TAPS,
            _DELTA_DECAY,
            _DELTA_STEPS,
            _DELTA_NORM,
            _RATES_AND_DECAYS,
            _OUTPUT_GATES,
            _ZERO_CENTRED,
            _PARTIAL,
            _SHARED_GATE,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(  # as many key heads as value heads; every second layer attends, without a list of layer types
        "qwen3_5-of-one-kind",
        {
            **_DELTA,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 4,
            "tie_word_embeddings": True,
        },
        faults=(_DELTA_DECAY, _OUTPUT_GATES),
        json={"full_attention_interval": 2},
        drops=("layer_types",),
    ),
    _case(
        "qwen3_5",
        _DELTA,
        faults=(
            _DELTA_TAPS,
            _DELTA_DECAY,
            _DELTA_STEPS,
            _DELTA_NORM,
            _OUTPUT_GATES,
            _ZERO_CENTRED,
            _PARTIAL,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "qwen3_5_moe",
        _DELTA_EXPERTS,
        faults=(_DELTA_DECAY, _OUTPUT_GATES, _SHARED_GATE),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "falcon_h1",
        {**_SIDE_BY_SIDE, "mamba_n_groups": 2, "mamba_d_conv": 3},
        faults=(*_FACTORS, _DECAY, _DIRECT, _STEPS, _HEADS, _WINDOW_BIAS),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "falcon_h1-norm",
        {**_SIDE_BY_SIDE, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2},
        faults=(
            _GATED_NORM,
            _factor("ssm_multipliers", index=0),
            Fault("norm-first", config={"mamba_norm_before_gate": True}),
        ),
    ),
    _case(  # llama.cpp supports no norm before the gates and requires `mamba_d_ssm`
        "falcon_h1-biases",
        {
            **_SIDE_BY_SIDE,
            "mamba_d_ssm": None,
            "mamba_rms_norm": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mamba_conv_bias": False,
            "mlp_bias": True,
            "mlp_multipliers": [1.0, 0.625],
            "tie_word_embeddings": True,
        },
        faults=(
            _factor("ssm_multipliers", index=0),
            _factor("ssm_in_multiplier"),
            _factor("attention_in_multiplier"),
            _factor("key_multiplier"),
        ),
        gguf=(),
    ),
)
