"""Xiaomi's MiMo V2: most layers have a window, sinks, and twice the KV heads; experts after the first layers.

Source: llama.cpp's converter (`conversion/mimo.py`).
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_HEADS
from tgi_asgi.models.gguf_module import (
    MAX_SIZE,
    GgufModule,
    common_names,
    layer_types,
    per_layer,
    read_common,
    read_routing,
)
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import SIGMOID


def read_mimo2(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration."""
    num_stored = reader.integer("num_hidden_layers")
    num_layers = num_stored - reader.integer("num_nextn_predict_layers", 0)
    check(0 < num_layers <= num_stored, f"nextn_predict_layers leaves {num_layers} layers")
    head_dim = reader.positive("head_dim", MAX_SIZE)
    turned = reader.positive("rope.dimension_count", head_dim)
    part = (turned + 0.5) / head_dim  # the class rounds the product with head_dim down
    reader.require(expert_gating_func=SIGMOID, expert_weights_norm=True)
    num_experts = reader.positive("n_routed_experts", MAX_SIZE)
    kinds = _read_kinds(reader, num_layers)
    return {
        **read_common(reader),
        "model_type": "mimo_v2_flash",
        "architectures": ["MiMoV2FlashForCausalLM"],
        "num_hidden_layers": num_layers,
        "num_key_value_heads": _read_kv_heads(reader, num_stored, kinds),
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "head_dim": head_dim,
        "v_head_dim": reader.positive("attention.value_length", MAX_SIZE),
        "attention_value_scale": reader.number("attention.value_scale", 1.0),
        "sliding_window": reader.positive("sliding_window", MAX_CONTEXT),
        "layer_types": kinds,
        "mlp_layer_types": [
            "sparse" if f"blk.{index}.ffn_gate_inp.weight" in reader.tensors else "dense"
            for index in range(num_layers)
        ],
        "n_routed_experts": num_experts,
        **read_routing(reader, num_experts),
        "routed_scaling_factor": reader.number("routed_scaling_factor", 1.0) or 1.0,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part}
            for kind, theta in (
                ("full_attention", reader.number("rope_theta", 5e6)),
                ("sliding_attention", reader.number("rope.freq_base_swa", 1e4)),
            )
        },
    }


def _read_kinds(reader: Reader, num_layers: int) -> list[str]:
    """Return the layers' kinds, which the converter writes as zeros and ones."""
    given = reader.get("sliding_window_pattern")
    if isinstance(given, list) and all(type(each) is int and each in (0, 1) for each in given):
        reader.replace("sliding_window_pattern", [bool(each) for each in given])
    return layer_types(reader, num_layers)


def _read_kv_heads(reader: Reader, num_stored: int, kinds: list[str]) -> int:
    """Return the number of KV heads of layers without a window; the class gives others twice as many."""
    heads = per_layer(reader, "num_key_value_heads", num_stored)[: len(kinds)]
    pairs = list(zip(heads, kinds, strict=True))
    found = {count // 2 if kind == "sliding_attention" else count for count, kind in pairs}
    is_even = all(count % 2 == 0 for count, kind in pairs if kind == "sliding_attention")
    check(
        is_even and len(found) == 1 and 0 < max(found) <= MAX_HEADS,
        "layers with a window must have twice the KV heads of others",
    )
    return found.pop()


_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm", "post_attention_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate",
    ),
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}  # fmt: skip
MODULES = (
    GgufModule(
        "mimo2",
        read_mimo2,
        _NAMES,
        joined={"mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
    ),
)
