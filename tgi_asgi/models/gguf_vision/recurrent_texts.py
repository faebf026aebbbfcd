"""Text models with recurrent layers, beside projectors: LFM2 and Qwen3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_HEADS, MAX_LAYERS
from tgi_asgi.models.gguf_module import MAX_SIZE, common_names, log_of_decay
from tgi_asgi.models.gguf_vision.text_reading import (
    NAMES,
    WITH_NORMS,
    Orders,
    Text,
    less_one,
    read_plain,
    read_rope,
    read_sections,
)
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import leave_out_drafting, read_kv_heads

_MAX_CHANNELS = 1 << 20  # of all heads


def _read_lfm2(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of an LFM2, most layers of which have a short convolution."""
    num_layers = reader.positive("num_hidden_layers", MAX_LAYERS)
    attends = [f"blk.{index}.shortconv.conv.weight" not in reader.tensors for index in range(num_layers)]
    read_kv_heads(reader, attends)
    config = read_plain(reader, file)
    return {
        **config,
        "block_auto_adjust_ff_dim": False,  # the file has the size that results
        "norm_eps": config["rms_norm_eps"],
        "layer_types": ["full_attention" if each else "conv" for each in attends],
        "conv_L_cache": reader.positive("conv_L_cache", MAX_SIZE),
        "conv_bias": any(name.endswith(".shortconv.conv.bias") for name in reader.tensors),
        "rope_parameters": read_rope(reader),
    }


def _read_qwen35(reader: Reader, file: GgufFile, *, has_experts: bool = False) -> dict[str, Any]:
    """Return the configuration of a Qwen3.5, most layers of which have a gated delta net."""
    leave_out_drafting(reader)
    reader.ignore("attention.recurrent_layers", "full_attention_interval")
    num_layers = reader.positive("num_hidden_layers", MAX_LAYERS)
    recurs = [f"blk.{index}.ssm_conv1d.weight" in reader.tensors for index in range(num_layers)]
    config = read_plain(reader, file, has_experts=has_experts, is_partly_rotary=True)
    head_dim = config["head_dim"]
    turned = reader.integer("rope.dimension_count", head_dim)
    check(
        0 < turned <= head_dim and turned % 2 == 0,
        f"rope.dimension_count must be even and in 1..{head_dim}, got {turned}",
    )
    rope = read_rope(reader)
    return {
        **config,
        "layer_types": ["linear_attention" if each else "full_attention" for each in recurs],
        **_read_delta(reader),
        "rope_parameters": {
            **rope,
            "partial_rotary_factor": turned / head_dim,
            "mrope_section": read_sections(reader, turned // 2),
            "mrope_interleaved": True,
        },
    }


def _read_delta(reader: Reader) -> dict[str, int]:
    """Return the sizes of the delta nets."""
    heads = reader.positive("ssm.time_step_rank", MAX_HEADS)
    width = reader.positive("ssm.inner_size", _MAX_CHANNELS)
    check(width % heads == 0, f"ssm.inner_size {width} must be whole heads, of which there are {heads}")
    key_heads = reader.positive("ssm.group_count", MAX_HEADS)
    check(heads % key_heads == 0, f"{heads} heads of values cannot share {key_heads} of keys")
    return {
        "linear_num_value_heads": heads,
        "linear_value_head_dim": width // heads,
        "linear_num_key_heads": key_heads,
        "linear_key_head_dim": reader.positive("ssm.state_size", _MAX_CHANNELS // key_heads),
        "linear_conv_kernel_dim": reader.positive("ssm.conv_kernel", MAX_SIZE),
    }


def _read_qwen35moe(reader: Reader, file: GgufFile) -> dict[str, Any]:
    num_experts = reader.positive("num_experts", MAX_SIZE)
    shared = reader.positive("shared_expert_intermediate_size", MAX_SIZE)
    reader.require(expert_group_count=0, expert_shared_count=0, expert_weights_norm=True)
    reader.replace("intermediate_size", shared)  # every layer has experts
    return {
        **_read_qwen35(reader, file, has_experts=True),
        "num_experts": num_experts,
        "num_experts_per_tok": reader.positive("num_experts_per_tok", num_experts),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "shared_expert_intermediate_size": shared,
    }


def _orders(config: Mapping[str, Any]) -> tuple[Orders, Orders]:
    """Return the orders of what belongs to heads of values, which llama.cpp interleaves.

    Of two heads of keys with two of values each, the model has those of the first key first:

        model    k0v0  k0v1  k1v0  k1v1
        file     k0v0  k1v0  k0v1  k1v1
    """
    heads, key_heads = config["linear_num_value_heads"], config["linear_num_key_heads"]
    if heads == key_heads:
        return {}, {}
    in_file = np.arange(heads).reshape(-1, key_heads).T.reshape(-1)  # the file's head of each of the model's
    head_dim, num_others = config["linear_value_head_dim"], 2 * key_heads * config["linear_key_head_dim"]
    channels = _each(in_file, head_dim)
    after_keys = np.concatenate([np.arange(num_others), num_others + channels])
    rows = {
        **dict.fromkeys(("attn_qkv.weight", "ssm_conv1d.weight"), after_keys),
        "attn_gate.weight": channels,
        **dict.fromkeys(("ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"), in_file),
    }
    return rows, {"ssm_out.weight": _each(np.argsort(in_file), head_dim)}


def _each(heads: npt.NDArray[np.int64], head_dim: int) -> npt.NDArray[np.int64]:
    """Return the indices of all channels of these heads."""
    found: npt.NDArray[np.int64] = (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
    return found


_LFM2_NAMES = {
    **{own: NAMES[own] for own in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    "self_attn.out_proj": NAMES["self_attn.o_proj"],
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "operator_norm": NAMES["input_layernorm"],
    "ffn_norm": NAMES["post_attention_layernorm"],
    "feed_forward.w1": NAMES["mlp.gate_proj"],
    "feed_forward.w2": NAMES["mlp.down_proj"],
    "feed_forward.w3": NAMES["mlp.up_proj"],
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
}
_QWEN35_NAMES = {
    **WITH_NORMS,
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
_QWEN35_NORMS = ("output_norm", "attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm")
_QWEN35_RESTORED = {"ssm_a": log_of_decay, **{f"{name}.weight": less_one for name in _QWEN35_NORMS}}
_SHARED = {
    f"mlp.shared_expert.{name}": f"ffn_{name.removesuffix('_proj')}_shexp"
    for name in ("gate_proj", "up_proj", "down_proj")
}
RECURRENT_TEXTS: Mapping[str, Text] = {
    "lfm2": Text(
        _read_lfm2, _LFM2_NAMES, outer={"embed_tokens": "token_embd", "embedding_norm": "token_embd_norm"}
    ),
    "qwen35": Text(_read_qwen35, _QWEN35_NAMES, restored=_QWEN35_RESTORED, orders=_orders),
    "qwen35moe": Text(
        _read_qwen35moe,
        {
            **{own: stored for own, stored in _QWEN35_NAMES.items() if not own.startswith("mlp.")},
            **_SHARED,
            **common_names("mlp.gate", "mlp.shared_expert_gate"),
            "mlp.experts.down_proj": "ffn_down_exps.weight",
        },
        restored=_QWEN35_RESTORED,
        joined={"mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
        orders=_orders,
    ),
}
