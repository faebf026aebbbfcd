"""The model families that are compared with `transformers`: one entry for each family and variant, data only.

`family_files` makes checkpoints, references and GGUF files from the cases, and `family_scores` runs them. A
new family needs an entry or two; `BASE` holds the values that its configuration class does not default.
`families_plain` holds the families that are not like Llama.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.support.families_newer import NEWER_CASES
from tests.support.families_plain import PLAIN_CASES
from tests.support.family_case import FamilyCase, Fault, case_of
from tests.support.family_channels import CHANNEL_CASES
from tests.support.family_experts import EXPERT_CASES
from tests.support.family_gemma4 import GEMMA4_CASES
from tests.support.family_latent import LATENT_CASES
from tests.support.family_parts import PART_CASES
from tests.support.family_states import STATE_CASES

_ROPE_BASE = Fault("rope-base", config={"rope_parameters": {"rope_theta": 100.0}})
_INPUT_NORM = Fault("no-input-norm", tensors="*.input_layernorm.weight", change="to ones")
_MLP_NORM = Fault("no-mlp-norm", tensors="*.post_attention_layernorm.weight", change="to ones")
_LAST_NORM = Fault("no-last-norm", tensors="model.norm.weight", change="to ones")
_QUERY_NORM = Fault("no-query-norm", tensors="*.q_norm.weight", change="to ones")
_KEY_NORM = Fault("no-key-norm", tensors="*.k_norm.weight", change="to ones")
_FEED_FORWARD_NORM = Fault(
    "no-feed-forward-norm", tensors="*.post_feedforward_layernorm.weight", change="to ones"
)
_QUERY_BIAS = Fault("no-query-bias", tensors="*.q_proj.bias")
_VALUE_BIAS = Fault("no-value-bias", tensors="*.v_proj.bias")
_OUTPUT_BIAS = Fault("no-output-bias", tensors="*.o_proj.bias")
_DOWN_BIAS = Fault("no-down-bias", tensors="*.down_proj.bias")
_FUSED_QKV = Fault("order-of-qkv", tensors="*.qkv_proj.weight", change="swap halves")
_FUSED_GATE_UP = Fault("order-of-gate_up", tensors="*.gate_up_proj.weight", change="swap halves")
_NO_SCALING = Fault("rope-unscaled", config={"rope_parameters": {"rope_type": "default"}})

_ALL_TYPES = ("f32", "f16", "bf16", "q8_0")


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
_case = partial(case_of, _ARCHITECTURES)

_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.35,  # the usual scale would be 0.177
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
}
_MULTIPLIERS = tuple(
    Fault(name, config={name: value})
    for name, value in {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.17677669,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }.items()
)
# For 16 rotary pairs; a prompt within the original context uses the short factors.
_LONGROPE = {
    "original_max_position_embeddings": 64,
    **_rope(
        "longrope",
        short_factor=[1.0 + 0.05 * index for index in range(16)],
        long_factor=[1.0 + 0.5 * index for index in range(16)],
        original_max_position_embeddings=64,
    ),
}
# A prompt is longer than twice the original training context.
_GROWING = {
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
_SHORT_FACTOR = Fault("short-factors", config={"rope_parameters": {"short_factor": [1.0] * 16}})
_LONG_FACTOR = Fault("long-factors", config={"rope_parameters": {"long_factor": [1.0] * 16}})
_WIDER = Fault("window-off-by-one", config={"sliding_window": 13})
_SLIDES = Fault("all-layers-slide", config={"layer_types": ["sliding_attention"] * 3, "max_window_layers": 0})

CASES: tuple[FamilyCase, ...] = (
    _case("llama", faults=(_ROPE_BASE, _INPUT_NORM, _LAST_NORM), gguf=_ALL_TYPES),
    _case(
        "llama-biases",
        {"attention_bias": True, "mlp_bias": True},
        faults=(_QUERY_BIAS, _VALUE_BIAS, _OUTPUT_BIAS, _DOWN_BIAS),
    ),
    _case("llama-tied", {"tie_word_embeddings": True}, faults=(_MLP_NORM,), gguf=("f32", "q8_0")),
    _case(
        "llama-rope-llama3",
        {"rope_parameters": {"rope_theta": 10000.0, **_LLAMA3_SCALING}},
        faults=(_NO_SCALING,),
        dtype="bfloat16",
    ),
    _case("llama-rope-linear", _rope("linear", factor=4.0), faults=(_NO_SCALING,)),
    _case(
        "llama-rope-yarn",
        _rope("yarn", factor=4.0, original_max_position_embeddings=64),
        faults=(_NO_SCALING, Fault("yarn-scale", config={"rope_parameters": {"attention_factor": 1.0}})),
    ),
    _case(
        "llama-head-16",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
        faults=(_ROPE_BASE,),
        gguf=("f32", "q8_0"),
    ),
    _case("llama-hidden-64", {"hidden_size": 64, "head_dim": 32}, faults=(_ROPE_BASE,), gguf=("f32", "f16")),
    _case(
        "llama-head-80",
        {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80},
        faults=(_ROPE_BASE,),
        gguf=("f32", "f16"),
    ),
    _case(
        "llama-head-24",
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 24},
        faults=(_ROPE_BASE,),
    ),
    _case(
        "llama-odd-sizes",
        {"hidden_size": 72, "intermediate_size": 100, "head_dim": 32, "vocab_size": 307},
        faults=(_INPUT_NORM,),
        gguf=("f32", "f16"),
    ),
    _case(  # transformers 5 uses a stored head that is not the embedding, whatever the file says
        "llama-own-head",
        json={"tie_word_embeddings": True},
        faults=(Fault("order-of-head", tensors="lm_head.weight", change="swap halves"),),
        gguf=(),
    ),
    _case("llama-stray-window", {"sliding_window": 12}, faults=(_ROPE_BASE,), gguf=()),
    _case(
        "llama-old-config",  # as transformers 4 wrote it
        {},
        faults=(Fault("rope-base", config={"rope_theta": 100.0}),),
        gguf=(),
        dtype="bfloat16",
        json={"rope_theta": 5000.0, "rope_scaling": _LLAMA3_SCALING},
        drops=("rope_parameters", "head_dim"),
    ),
    _case(
        "mistral", {"sliding_window": None}, faults=(_ROPE_BASE, _INPUT_NORM, _MLP_NORM), gguf=("f32", "bf16")
    ),
    _case(  # the converter writes no window for Mistral
        "mistral-window",
        {"sliding_window": 12},
        faults=(Fault("no-window", config={"sliding_window": None}), _WIDER, _ROPE_BASE),
        gguf=(),
    ),
    _case(
        "ministral",
        {
            "head_dim": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        faults=(
            _WIDER,
            Fault(
                "other-layers-slide", config={"layer_types": ["full_attention", *["sliding_attention"] * 2]}
            ),
            _ROPE_BASE,
            _INPUT_NORM,
        ),
        gguf=(),
    ),
    _case(
        "ministral-old-config",
        {"sliding_window": 12, "head_dim": 32},
        faults=(_WIDER,),
        gguf=(),
        dtype="bfloat16",
        json={"rope_theta": 5000.0, "use_sliding_window": False},
        drops=("rope_parameters", "layer_types"),
    ),
    _case(
        "ministral3",
        {"head_dim": 32, **_rope("yarn", **_GROWING)},
        faults=(
            Fault("slower-growth", config={"rope_parameters": {"llama_4_scaling_beta": 0.25}}),
            Fault("scaled-rope", config={"rope_parameters": {"mscale": 0.0}}),
            _INPUT_NORM,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "ministral3-window",
        {"head_dim": 32, **_rope("yarn", **_GROWING), "sliding_window": 12, "tie_word_embeddings": True},
        faults=(_WIDER,),
        gguf=(),
        dtype="bfloat16",
    ),
    _case(  # not the default of the class
        "ministral3-old-config",
        {"head_dim": 32, **_rope("yarn", **_GROWING)},
        faults=(Fault("unscaled", config={"rope_scaling": {"factor": 1.0}}),),
        gguf=(),
        json={"rope_scaling": {**_GROWING, "type": "yarn", "factor": 4.0}, "rope_theta": 5000.0},
        drops=("rope_parameters",),
    ),
    _case(
        "seed_oss",
        {"head_dim": 32},
        faults=(_QUERY_BIAS, _VALUE_BIAS, _ROPE_BASE, _MLP_NORM),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "ernie4_5",
        {"head_dim": 32, "tie_word_embeddings": True},
        faults=(_ROPE_BASE, _INPUT_NORM, _MLP_NORM),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "ernie4_5-biases",
        {"use_bias": True, "head_dim": 24},
        faults=(_QUERY_BIAS, _OUTPUT_BIAS, _DOWN_BIAS),
        gguf=(),
        json={"rope_theta": 5000.0},
        drops=("rope_parameters",),
    ),
    _case(
        "seed_oss-biases",
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": 24},
        faults=(_OUTPUT_BIAS, _DOWN_BIAS),
    ),
    _case("qwen2", faults=(_ROPE_BASE, _QUERY_BIAS, _VALUE_BIAS), gguf=("f32", "q8_0")),
    _case(
        "qwen2-unused-window",  # it applies from layer max_window_layers on, so to no layer
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3},
        faults=(_SLIDES,),
        drops=("layer_types",),
    ),
    _case(
        "qwen2-window",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        faults=(_WIDER, _SLIDES),
        gguf=(),
    ),
    _case("qwen2-tied", {"tie_word_embeddings": True}, faults=(_QUERY_BIAS,), dtype="bfloat16"),
    _case("qwen3", {"head_dim": 32}, faults=(_QUERY_NORM, _KEY_NORM, _ROPE_BASE), gguf=("f32", "q8_0")),
    _case("qwen3-wide-heads", {"hidden_size": 96, "head_dim": 64}, faults=(_QUERY_NORM,)),
    _case("granite", _GRANITE, faults=(*_MULTIPLIERS, _INPUT_NORM), gguf=("f32", "bf16")),
    _case(
        "granite-tied",
        {**_GRANITE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        faults=(_QUERY_BIAS, _DOWN_BIAS),
    ),
    _case(
        "smollm3",
        {"num_hidden_layers": 4, "tie_word_embeddings": True},
        faults=(
            Fault("rope-everywhere", config={"no_rope_layers": [1, 1, 1, 1]}),
            _ROPE_BASE,
            _INPUT_NORM,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(  # llama.cpp only supports every fourth layer
        "smollm3-other-layers",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [0, 1, 0, 1],
            "use_sliding_window": False,  # without effect beside `layer_types`
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
        faults=(_WIDER, Fault("rope-in-other-layers", config={"no_rope_layers": [1, 0, 1, 0]})),
        gguf=(),
    ),
    _case(
        "smollm3-window",  # in the layers without positions
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 12,
            "no_rope_layers": [0, 1, 0, 1],
        },
        faults=(_WIDER, Fault("no-window", config={"use_sliding_window": False})),
        gguf=(),
        drops=("layer_types",),
    ),
    _case("phi3", faults=(_FUSED_QKV, _FUSED_GATE_UP, _ROPE_BASE), gguf=("f32", "q8_0")),
    _case(
        "phi3-partial-rotary",
        {**_rope("default", partial_rotary_factor=0.75), "tie_word_embeddings": True},
        faults=(
            Fault("all-is-rotated", config={"rope_parameters": {"partial_rotary_factor": 1.0}}),
            _ROPE_BASE,
        ),
    ),
    _case("phi3-short-factors", _LONGROPE, faults=(_SHORT_FACTOR,), max_total_tokens=64),
    _case("phi3-long-factors", _LONGROPE, faults=(_LONG_FACTOR,), prompt_length=72),
    _case(  # like Phi-4-mini's
        "phi3-old-config",
        {"original_max_position_embeddings": 64, "tie_word_embeddings": True},
        faults=(Fault("rope-base", config={"rope_theta": 100.0}),),
        json={
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.05 * index for index in range(12)],
                "long_factor": [1.0 + 0.5 * index for index in range(12)],
            },
        },
        drops=("rope_parameters",),
        dtype="bfloat16",
        prompt_length=72,
    ),
    _case("olmo2", faults=(_QUERY_NORM, _MLP_NORM, _FEED_FORWARD_NORM), gguf=("f32", "q8_0")),
    *NEWER_CASES,
    *PLAIN_CASES,
    *EXPERT_CASES,
    *LATENT_CASES,
    *GEMMA4_CASES,
    *PART_CASES,
    *CHANNEL_CASES,
    *STATE_CASES,
)
