"""Cases of the families with LayerNorm, mostly older than Llama, each with its own tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.family_case import FamilyCase, Fault, ignores_biases, ignores_weights

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
# Names that most configurations use for their sizes.
_USUAL: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_NEOX = {name: value for name, value in _USUAL.items() if name != "num_key_value_heads"}
_GPT2 = {**_COMMON, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256}
_FALCON = {
    **_COMMON,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_kv_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_BLOOM = {**_COMMON, "hidden_size": 128, "n_layer": 3, "n_head": 4, "tie_word_embeddings": True}
_MPT = {
    **_COMMON,
    "d_model": 128,
    "n_layers": 3,
    "n_heads": 4,
    "max_seq_len": 256,
    "tie_word_embeddings": True,
}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **parameters}}


_ROPE_BASE = Fault("rope-base", config={"rope_parameters": {"rope_theta": 100.0}})
_LESS_TURNS = Fault("less-turns", config={"rope_parameters": {"partial_rotary_factor": 0.25}})
_QKV = Fault("order-of-qkv", tensors="*.query_key_value.weight", change="swap halves")
_WIDER = Fault("window-off-by-one", config={"sliding_window": 13})
_ACTIVATION = Fault("relu", config={"hidden_act": "relu"})
_NOT_PARALLEL = Fault("not-parallel", config={"use_parallel_residual": False})


def _case(
    name: str, architecture: str, base: Mapping[str, Any], more: Mapping[str, Any] | None = None, **rest: Any
) -> FamilyCase:
    return FamilyCase(name, architecture, {**base, **(more or {})}, **rest)


PLAIN_CASES: tuple[FamilyCase, ...] = (
    _case(
        "starcoder2",
        "Starcoder2ForCausalLM",
        _USUAL,
        _rope(),
        faults=(
            ignores_weights("input_layernorm"),
            ignores_biases("input_layernorm"),
            ignores_biases("c_fc"),
            ignores_biases("c_proj"),
            _ROPE_BASE,
            _ACTIVATION,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "starcoder2-window",  # with further keys that the files on the Hub contain
        "Starcoder2ForCausalLM",
        _USUAL,
        {**_rope(), "sliding_window": 12, "tie_word_embeddings": True},
        faults=(_WIDER,),
        gguf=(),
        dtype="bfloat16",
        json={
            "rope_theta": 5000.0,
            "activation_function": "gelu_pytorch_tanh",
            "layer_norm_epsilon": 1e-5,
            "mlp_type": "default",
            "norm_type": "layer_norm",
            "scale_attn_weights": True,
            "scale_attention_softmax_in_fp32": True,
        },
        drops=("rope_parameters",),
    ),
    _case(
        "starcoder2-without-biases",
        "Starcoder2ForCausalLM",
        _USUAL,
        {**_rope(), "use_bias": False},
        faults=(ignores_biases("post_attention_layernorm"),),
    ),
    _case(
        "stablelm",
        "StableLmForCausalLM",
        _USUAL,
        {**_rope(partial_rotary_factor=0.5), "use_qkv_bias": True},
        faults=(
            ignores_weights("post_attention_layernorm"),
            ignores_biases("input_layernorm"),
            ignores_biases("q_proj"),
            _LESS_TURNS,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "stablelm-parallel",  # like StableLM 2, 12B
        "StableLmForCausalLM",
        _USUAL,
        {**_rope(partial_rotary_factor=0.25), "use_parallel_residual": True, "qk_layernorm": True},
        faults=(
            Fault("no-query-norms", tensors="*.q_layernorm.norms.*.weight", change="to ones"),
            Fault("no-norm-of-the-last-key", tensors="*.k_layernorm.norms.1.weight", change="to ones"),
            _ROPE_BASE,
        ),
    ),
    _case(
        "stablelm-old-config",
        "StableLmForCausalLM",
        _USUAL,
        {
            **_rope(partial_rotary_factor=0.25),
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
        faults=(ignores_biases("model.norm"),),
        gguf=(),
        json={"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        drops=("rope_parameters",),
    ),
    _case(
        "phi",
        "PhiForCausalLM",
        _USUAL,
        {**_rope(partial_rotary_factor=0.5), "num_key_value_heads": 4, "intermediate_size": 512},
        faults=(
            ignores_weights("input_layernorm"),
            ignores_biases("final_layernorm"),
            ignores_biases("dense"),
            ignores_biases("fc2"),
            ignores_biases("lm_head"),
            _LESS_TURNS,
            _ACTIVATION,
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "phi-head-norms",
        "PhiForCausalLM",
        _USUAL,
        {**_rope(partial_rotary_factor=0.5), "qk_layernorm": True},
        faults=(ignores_weights("q_layernorm"), ignores_biases("q_layernorm")),
        gguf=(),
    ),
    _case(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _NEOX,
        _rope(partial_rotary_factor=0.5),
        faults=(
            ignores_weights("post_attention_layernorm"),
            ignores_biases("query_key_value"),
            _QKV,
            _LESS_TURNS,
            _NOT_PARALLEL,
            _ACTIVATION,
        ),
        gguf=("f32", "q8_0"),
        json={"rotary_pct": 0.5},  # the only name that the converter reads
    ),
    _case(
        "gpt_neox-sequential",
        "GPTNeoXForCausalLM",
        _NEOX,
        {**_rope(partial_rotary_factor=0.25), "use_parallel_residual": False, "hidden_act": "gelu_fast"},
        faults=(Fault("parallel", config={"use_parallel_residual": True}),),
        gguf=(),
        json={"rotary_pct": 0.5, "rotary_emb_base": 5000},
        drops=("rope_parameters",),
        dtype="bfloat16",
    ),
    _case("gpt_neox-own-names", "GPTNeoXForCausalLM", _NEOX, {}, faults=(), gguf=(), is_fused=True),
    _case(
        "gpt_neox-without-biases",
        "GPTNeoXForCausalLM",
        _NEOX,
        {**_rope(partial_rotary_factor=1.0), "attention_bias": False},
        faults=(_QKV,),
        gguf=(),
    ),
    _case(
        "gpt2",
        "GPT2LMHeadModel",
        _GPT2,
        {"tie_word_embeddings": True},
        faults=(
            Fault("positions-swapped", tensors="*.wpe.weight", change="swap halves"),
            ignores_weights("ln_1"),
            ignores_biases("ln_2"),
            ignores_biases("attn.c_attn"),
            Fault("relu", config={"activation_function": "relu"}),
        ),
        gguf=("f32", "f16"),
        json={"n_ctx": 256},
    ),
    _case(
        "gpt2-scales",
        "GPT2LMHeadModel",
        _GPT2,
        {"n_inner": 192, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
        faults=(
            Fault("not-by-layer", config={"scale_attn_by_inverse_layer_idx": False}),
            Fault("unscaled", config={"scale_attn_weights": False}),
        ),
        gguf=(),
        dtype="bfloat16",
    ),
    _case(
        "falcon",  # like 7B
        "FalconForCausalLM",
        _FALCON,
        _rope(),
        faults=(
            ignores_weights("input_layernorm"),
            ignores_biases("input_layernorm"),
            _QKV,
            _ROPE_BASE,
            Fault("relu", config={"activation": "relu"}),
        ),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "falcon-new",  # like 40B
        "FalconForCausalLM",
        _FALCON,
        {**_rope(), "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 512},
        faults=(ignores_weights("ln_attn"), ignores_weights("ln_mlp"), _QKV),
        gguf=("f32", "q8_0"),
    ),
    _case(
        "falcon-one-norm",  # like 11B
        "FalconForCausalLM",
        _FALCON,
        {
            **_rope(),
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "num_kv_heads": 2,
            "ffn_hidden_size": 192,
            "tie_word_embeddings": False,
        },
        faults=(ignores_weights("input_layernorm"),),
        gguf=(),
    ),
    _case(
        "falcon-rw",  # like RW 1B; the converter does not support slopes
        "FalconForCausalLM",
        _FALCON,
        {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4},
        attention="sdpa",  # eager adds the slopes twice
        faults=(
            Fault("rotary", config={"alibi": False}),
            ignores_biases("query_key_value"),
            ignores_weights("post_attention_layernorm"),
        ),
        gguf=(),
    ),
    _case(
        "falcon-old-config",
        "FalconForCausalLM",
        _FALCON,
        {**_rope(), "new_decoder_architecture": True, "num_kv_heads": 2},
        faults=(ignores_weights("ln_mlp"),),
        gguf=(),
        dtype="bfloat16",
    ),
    _case(
        "bloom",
        "BloomForCausalLM",
        _BLOOM,
        faults=(
            ignores_weights("word_embeddings_layernorm"),
            ignores_biases("word_embeddings_layernorm"),
            ignores_biases("query_key_value"),
            _QKV,
            ignores_weights("ln_f"),
        ),
        gguf=("f32", "q8_0"),
        json={"seq_length": 256},
    ),
    _case(
        "bloom-six-heads",  # not a power of two, so the slopes form two series
        "BloomForCausalLM",
        _BLOOM,
        {"hidden_size": 96, "n_head": 6, "tie_word_embeddings": False},
        faults=(ignores_weights("input_layernorm"),),
        gguf=(),
    ),
    _case(
        "mpt",
        "MptForCausalLM",
        _MPT,
        {"attn_config": {"clip_qkv": 0.5}},
        faults=(
            Fault("unclipped", config={"attn_config": {"clip_qkv": None}}),
            ignores_weights("norm_1"),
            ignores_weights("norm_f"),
            Fault("order-of-qkv", tensors="*.Wqkv.weight", change="swap halves"),
        ),
        gguf=("f32", "q8_0"),
        json={"architectures": ["MPTForCausalLM"]},  # as on the Hub
    ),
    _case(
        "mpt-twelve-heads",
        "MptForCausalLM",
        _MPT,
        {"d_model": 96, "n_heads": 12},
        faults=(ignores_weights("norm_2"),),
        json={"architectures": ["MPTForCausalLM"]},
    ),
    _case(
        "mpt-scale",  # a value that the converter drops
        "MptForCausalLM",
        _MPT,
        {"attn_config": {"softmax_scale": 0.2}, "tie_word_embeddings": False},
        faults=(Fault("scale", config={"attn_config": {"softmax_scale": 0.4}}),),
        gguf=(),
        dtype="bfloat16",
    ),
)
