"""Configurations of the older families, as in checkpoints on the Hub, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading.recognise import read_config

GPT2: dict[str, Any] = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_inner": None, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}},
    "vocab_size": 50257,
}  # fmt: skip
PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8,
    "num_hidden_layers": 16, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
FALCON_7B: dict[str, Any] = {
    "alibi": False, "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": False, "bos_token_id": 11,
    "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": 4544, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": True,
    "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
    "num_kv_heads": 71, "parallel_attn": True, "torch_dtype": "bfloat16", "vocab_size": 65024,
}  # fmt: skip
# The first configuration of 40B, for TII's own code.
FALCON_40B: dict[str, Any] = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["RWForCausalLM"],
    "attention_dropout": 0.0, "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0,
    "hidden_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "RefinedWeb", "n_head": 128,
    "n_head_kv": 8, "n_layer": 60, "parallel_attn": True, "vocab_size": 65024,
}  # fmt: skip
FALCON_RW: dict[str, Any] = {
    **FALCON_7B, "alibi": True, "bias": True, "hidden_size": 2048, "multi_query": False,
    "num_attention_heads": 32, "num_hidden_layers": 24, "num_kv_heads": 32, "parallel_attn": False,
}  # fmt: skip
BLOOM: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "architectures": ["BloomForCausalLM"], "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024,
    "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1,
    "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False,
    "unk_token_id": 0, "use_cache": True, "vocab_size": 250880,
}  # fmt: skip
MPT: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
        "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    },
    "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_device": "cpu",
    "init_config": {"name": "kaiming_normal_", "init_nonlinearity": "relu"}, "learned_pos_emb": True,
    "logit_scale": None, "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32, "n_layers": 32,
    "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "use_cache": False,
    "verbose": 0, "vocab_size": 50432,
}  # fmt: skip
PHI_2: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0,
    "eos_token_id": 50256, "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
}  # fmt: skip
# For Stability's own code.
STABLELM: dict[str, Any] = {
    "architectures": ["StableLMEpochForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 6912,
    "max_position_embeddings": 4096, "model_type": "stablelm_epoch", "norm_eps": 1e-05,
    "num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rope_pct": 0.25, "rope_theta": 10000, "rotary_scaling_factor": 1.0, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 50304,
}  # fmt: skip


def read(config: dict[str, Any], **changes: Any) -> ModelConfig:
    return read_config({**config, **changes})[1]


def test_gpt2_has_learned_positions_and_four_times_its_width() -> None:
    config = read(GPT2)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (768, 3072, 12)
    assert (config.context_length, config.has_learned_positions) == (1024, True)
    assert (config.activation, config.has_tied_embeddings) == ("gelu_tanh", True)
    assert read(GPT2, n_inner=100).intermediate_size == 100


def test_a_quarter_of_a_head_of_pythia_turns() -> None:
    config = read(PYTHIA)
    assert config.layers[0].rope is not None
    assert config.layers[0].rope.dim == 64
    assert (config.is_parallel, config.has_mlp_norm, config.activation) == (True, True, "gelu")


def test_falcons_differ_in_heads_norms_and_positions() -> None:
    small, large, first = read(FALCON_7B), read(FALCON_40B), read(FALCON_RW)
    assert [each.num_kv_heads for each in (small, large, first)] == [1, 8, 32]
    assert [(each.is_parallel, each.has_mlp_norm) for each in (small, large, first)] == [
        (True, False),
        (True, True),
        (False, True),
    ]
    assert [layer.layers[0].rope is None for layer in (small, large, first)] == [False, False, True]
    assert first.layers[0].slopes is not None
    assert first.layers[0].slopes[0] == pytest.approx(2**-0.25 / 8)  # scaled, like scores


def test_the_file_of_falcon_11b_also_has_the_ratio_of_its_mlp_s_width() -> None:
    keys = {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 32768}
    assert read({**FALCON_40B, **keys, "ff_factor": 4}) == read({**FALCON_40B, **keys})


def test_blooms_context_is_its_sequence_length() -> None:
    config = read(BLOOM)
    assert (config.hidden_size, config.num_layers, config.context_length) == (1024, 24, 2048)
    assert config.layers[0].slopes is not None
    assert len(config.layers[0].slopes) == 16


def test_mpt_reads_the_configuration_of_its_attention() -> None:
    assert read(MPT).clip is None
    attention = {**MPT["attn_config"], "clip_qkv": 6, "softmax_scale": 0.1, "alibi_bias_max": 16}
    config = read(MPT, attn_config=attention)
    assert (config.clip, config.layers[0].scale) == (6.0, 0.1)
    assert config.layers[0].slopes is not None
    assert config.layers[0].slopes[-1] == pytest.approx(2.0**-16)


def test_of_phi_2_part_of_a_head_turns() -> None:
    config = read(PHI_2)
    assert config.layers[0].rope is not None
    assert config.layers[0].rope.dim == 32
    assert config.has_head_bias


def test_stabilitys_own_names_of_keys_are_known() -> None:
    config = read(STABLELM)
    assert config.layers[0].rope is not None
    assert (config.layers[0].rope.dim, config.norm_eps, config.is_parallel) == (20, 1e-5, False)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"activation_function": "mish"}, "'mish' is not supported"),
        (GPT2, {"n_embd": None}, "lacks `hidden_size`"),
        (FALCON_40B, {"parallel_attn": False}, "parallel_attn must be true"),
        (FALCON_7B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn must be 1..1"),
        (BLOOM, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        (MPT, {"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        (MPT, {"no_bias": False}, "no_bias"),
        (MPT, {"expansion_ratio": 3}, "expansion_ratio"),
        (MPT, {"attn_config": {"alibi": False}}, "alibi"),
        (MPT, {"attn_config": {"qk_ln": True}}, "qk_ln"),
        (MPT, {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
        (MPT, {"attn_config": {"kv_n_heads": 8}}, "kv_n_heads"),
        (MPT, {"attn_config": {"new_norm": True}}, "new_norm"),
        (MPT, {"attn_config": {"alibi_bias_max": 1e9}}, "alibi_bias_max"),
        (MPT, {"attn_config": 3}, "attn_config must be an object"),
    ],
)
def test_what_is_not_computed_is_refused(config: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        read(config, **change)
