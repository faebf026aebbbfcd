"""Mamba 1 and 2, Falcon Mamba, and AI21's Jamba: Mamba's layers, attention without positions, experts.

Sources: llama.cpp's converter and model code (`conversion/mamba.py`, `conversion/jamba.py`,
`src/models/mamba-base.cpp`, `src/models/jamba.cpp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_HEADS, MAX_LAYERS
from tgi_asgi.models.gguf_module import (
    MAX_SIZE,
    GgufModule,
    common_names,
    log_of_decay,
    per_layer,
    read_common,
    vocab_size_of,
)
from tgi_asgi.models.reader import Reader


def read_mamba(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of Mamba 1, or of Falcon Mamba, which also norms steps and states."""
    config = _read_pure(reader, file)
    has_norms = reader.flag("ssm.dt_b_c_rms", False)
    name = "FalconMamba" if has_norms else "Mamba"
    return config | {
        "model_type": "falcon_mamba" if has_norms else "mamba",
        "architectures": [f"{name}ForCausalLM"],
        "time_step_rank": reader.positive("mamba_n_heads", MAX_SIZE),
    }


def read_mamba2(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of Mamba 2."""
    config = _read_pure(reader, file)
    num_heads = reader.positive("mamba_n_heads", MAX_SIZE)
    inner_size = config["expand"] * config["hidden_size"]
    check(inner_size % num_heads == 0, f"ssm.inner_size {inner_size} must be whole heads")
    return config | {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": num_heads,
        "head_dim": inner_size // num_heads,
        "n_groups": reader.positive("mamba_n_groups", num_heads),
    }


def _read_pure(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return what Mamba 1 and 2 have."""
    # The converter writes any length of context, and no heads.
    reader.ignore(
        "vocab_size", "max_position_embeddings", "intermediate_size", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    hidden_size = reader.positive("hidden_size", MAX_SIZE)
    return {
        "vocab_size": vocab_size_of(file),
        "hidden_size": hidden_size,
        "num_hidden_layers": reader.positive("num_hidden_layers", MAX_LAYERS),
        "tie_word_embeddings": "output.weight" not in reader.tensors,
        "layer_norm_epsilon": reader.number("rms_norm_eps", 1e-5),
        "state_size": reader.positive("mamba_d_state", MAX_SIZE),
        "conv_kernel": reader.positive("mamba_d_conv", MAX_SIZE),
        "expand": _expansion(reader, hidden_size),
        "use_bias": any(name.endswith(".ssm_in.bias") for name in reader.tensors),
        "use_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in reader.tensors),
    }


def _expansion(reader: Reader, hidden_size: int) -> int:
    inner_size = reader.positive("ssm.inner_size", MAX_SIZE)
    check(inner_size % hidden_size == 0, f"ssm.inner_size must be a multiple of {hidden_size}")
    return inner_size // hidden_size


def read_jamba(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return Jamba's configuration; which layers attend or have experts must be periodic."""
    config = read_common(reader)
    num_layers = config["num_hidden_layers"]
    heads = per_layer(reader, "num_key_value_heads", num_layers, least=0)
    num_kv_heads = max(heads)
    check(0 < num_kv_heads <= MAX_HEADS, "a Jamba must have layers with attention")
    check(set(heads) <= {0, num_kv_heads}, "layers with attention must have the same number of KV heads")
    attends = [each > 0 for each in heads]
    routes = [f"blk.{index}.ffn_gate_inp.weight" in reader.tensors for index in range(num_layers)]
    num_experts = reader.integer("num_experts", 0)
    check(num_experts > 1 or not any(routes), "expert_count must be that of the layers with experts")
    attention, experts = _period("attention", attends), (num_layers + 1, num_layers)
    if any(routes):
        experts = _period("experts", routes)
    return config | {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "num_key_value_heads": num_kv_heads,
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "num_experts": max(num_experts, 1),
        "num_experts_per_tok": reader.integer("num_experts_per_tok", 1) or 1,
        "mamba_d_state": reader.positive("mamba_d_state", MAX_SIZE),
        "mamba_d_conv": reader.positive("mamba_d_conv", MAX_SIZE),
        "mamba_expand": _expansion(reader, config["hidden_size"]),
        "mamba_dt_rank": reader.positive("mamba_n_heads", MAX_SIZE),
        "mamba_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in reader.tensors),
        "mamba_proj_bias": any(name.endswith(".ssm_in.bias") for name in reader.tensors),
    }


def _period(what: str, holds: Sequence[bool]) -> tuple[int, int]:
    """Return the period and the offset of the layers for which something holds."""
    for period in range(1, len(holds) + 1):
        for offset in range(period):
            if [index % period == offset for index in range(len(holds))] == list(holds):
                return period, offset
    raise ModelLoadError(f"the layers with {what} have no period")


_MIXER = {
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "x_proj": "ssm_x",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "out_proj": "ssm_out",
}
_PURE_NAMES = {
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "lm_head": "output",
    "norm": "attn_norm",
    **{f"mixer.{name}": stored for name, stored in _MIXER.items()},
}
_JAMBA_NAMES = {
    **common_names(
        "model.embed_tokens", "lm_head", "input_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    ),
    **{f"mamba.{name}": stored for name, stored in _MIXER.items()},
    "model.final_layernorm": "output_norm",
    "mamba.dt_proj": "ssm_dt",
    "mamba.dt_layernorm": "ssm_dt_norm",
    "mamba.b_layernorm": "ssm_b_norm",
    "mamba.c_layernorm": "ssm_c_norm",
    "pre_ff_layernorm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.experts.*.gate_proj": "ffn_gate_exps",
    "feed_forward.experts.*.up_proj": "ffn_up_exps",
    "feed_forward.experts.*.down_proj": "ffn_down_exps",
}  # fmt: skip
_RESTORED = {"ssm_a": log_of_decay}
MODULES = (
    GgufModule(
        "mamba",
        read_mamba,
        {**_PURE_NAMES, "mixer.dt_proj": "ssm_dt"},
        layers="backbone.layers.",
        restored=_RESTORED,
    ),
    GgufModule(
        "mamba2",
        read_mamba2,
        {**_PURE_NAMES, "mixer.dt_bias": "ssm_dt.bias", "mixer.norm": "ssm_norm"},
        layers="backbone.layers.",
        restored=_RESTORED,
    ),
    GgufModule("jamba", read_jamba, _JAMBA_NAMES, restored=_RESTORED),
)
