"""Google's Gemma 3n and 4 (text): layers with embeddings of their own, and layers that share keys and values.

Sources: the converter and the model code of llama.cpp, by which these files are written and computed
(`conversion/gemma.py`, `src/models/gemma3n.cpp`, `src/models/gemma4.cpp`).
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

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
)
from tgi_asgi.models.reader import Reader

_ROPE_FREQS = "rope_freqs.weight"
_GEMMA3N_OWN_LAYERS = 20  # that have keys and values of their own, in files that do not say how many

_NAMES = {
    **common_names(
        "model.embed_tokens", "model.norm", "lm_head", "input_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ),
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}  # fmt: skip
GEMMA4_NAMES = {
    **_NAMES,
    "layer_scalar": "layer_output_scale.weight",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "router.proj": "ffn_gate_inp",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
_GEMMA3N_NAMES = {
    **_NAMES,
    "model.altup_projections.*": "altup_proj",
    "model.altup_unembed_projections.*": "altup_unembd_proj",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.correct_output_scale": "altup_correct_scale.weight",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
}


def read_gemma4(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return Gemma 4's configuration."""
    config = _read_common(reader)
    kinds = config["layer_types"]
    num_shared = reader.integer("attention.shared_kv_layers", 0)
    _check_shared(num_shared, kinds)
    num_own = len(kinds) - num_shared
    config["rope_parameters"]["full_attention"] |= {
        "rope_type": "proportional",
        "partial_rotary_factor": _turned_share(file),
    }
    return {
        **config,
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "num_kv_shared_layers": num_shared,
        "hidden_size_per_layer_input": reader.integer("embedding_length_per_layer_input", 0),
        **_gemma4_heads(reader, kinds),
        "attention_k_eq_v": _keys_are_values(reader, kinds[:num_own]),
        **_gemma4_mlp(reader, num_own, len(kinds)),
        **_gemma4_experts(reader),
    }


def _gemma4_heads(reader: Reader, kinds: list[str]) -> dict[str, Any]:
    """Return the shapes of heads: layers without a window have one of their own."""
    num_kv_heads = _by_kind(reader, "num_key_value_heads", kinds)
    head_dims = {
        "sliding_attention": reader.positive("attention.key_length_swa", MAX_SIZE),
        "full_attention": reader.positive("head_dim", MAX_SIZE),
    }
    value_dims = (
        reader.integer("attention.value_length_swa", head_dims["sliding_attention"]),
        reader.integer("attention.value_length", head_dims["full_attention"]),
    )
    check(value_dims == tuple(head_dims.values()), "Gemma 4's values must have the size of its keys")
    turned = {
        "sliding_attention": reader.integer("rope.dimension_count_swa", head_dims["sliding_attention"]),
        "full_attention": reader.integer("rope.dimension_count", head_dims["full_attention"]),
    }
    check(turned == head_dims, f"rope.dimension_count must be that of a head, {head_dims}, got {turned}")
    return {
        "num_key_value_heads": num_kv_heads["sliding_attention"],
        "head_dim": head_dims["sliding_attention"],
        "per_layer_config": {
            index: {"head_dim": head_dims[kind], "num_key_value_heads": num_kv_heads[kind]}
            for index, kind in enumerate(kinds)
            if kind == "full_attention"
        },
    }


def _keys_are_values(reader: Reader, own_kinds: list[str]) -> bool:
    """Return whether layers without a window use keys as values, given the kinds of layers that have keys."""
    full = [index for index, kind in enumerate(own_kinds) if kind == "full_attention"]
    has_values = {f"blk.{index}.attn_v.weight" in reader.tensors for index in full}
    check(len(has_values) < 2, "only some of the layers without a window have values of their own")
    return has_values == {False}


def _gemma4_mlp(reader: Reader, num_own: int, num_layers: int) -> dict[str, Any]:
    """Return the size of the MLPs: one, or double that in the layers after the `num_own` with own keys."""
    sizes = per_layer(reader, "intermediate_size", num_layers)
    is_double = num_own < num_layers and sizes[-1] == 2 * sizes[0]
    wanted = [sizes[0] * (1 + (is_double and index >= num_own)) for index in range(num_layers)]
    check(sizes == wanted, "feed_forward_length must be one size, or double where keys are shared")
    return {"intermediate_size": sizes[0], "use_double_wide_mlp": is_double}


def _gemma4_experts(reader: Reader) -> dict[str, Any]:
    """Return the experts beside the MLPs, if there are any."""
    num_experts = reader.integer("num_experts", 0)
    if not num_experts:
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": reader.positive("num_experts", MAX_SIZE),
        "top_k_experts": reader.positive("num_experts_per_tok", num_experts),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
    }


def read_gemma3n(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return Gemma 3n's configuration."""
    config = _read_common(reader)
    kinds = config["layer_types"]
    num_shared = reader.integer("attention.shared_kv_layers", max(len(kinds) - _GEMMA3N_OWN_LAYERS, 0))
    _check_shared(num_shared, kinds)
    head_dim = reader.positive("head_dim", MAX_SIZE)
    check(reader.integer("attention.value_length", head_dim) == head_dim, "values must have the size of keys")
    left = file.tensor("blk.0.laurel_l.weight")
    check(len(left.shape) == 2, f"tensor {left.name!r} must be a matrix, got the shape {list(left.shape)}")
    return config | {
        "model_type": "gemma3n_text",
        "architectures": ["Gemma3nForCausalLM"],
        "intermediate_size": per_layer(reader, "intermediate_size", len(kinds)),
        "num_key_value_heads": reader.positive("num_key_value_heads", MAX_HEADS),
        "head_dim": head_dim,
        "num_kv_shared_layers": num_shared,
        "hidden_size_per_layer_input": reader.positive("embedding_length_per_layer_input", MAX_SIZE),
        "altup_active_idx": reader.integer("altup.active_idx"),
        "altup_num_inputs": reader.positive("altup.num_inputs", MAX_HEADS),
        "laurel_rank": left.shape[0],
        "activation_sparsity_pattern": _sparsities(reader, len(kinds)),
    }


def _read_common(reader: Reader) -> dict[str, Any]:
    common = read_common(reader)
    theta, local_theta = reader.number("rope_theta", 1e6), reader.number("rope.freq_base_swa", 1e4)
    return common | {
        "vocab_size_per_layer_input": common["vocab_size"],  # the converter pads Gemma 3n's with zeros
        "sliding_window": reader.positive("sliding_window", MAX_CONTEXT),
        "layer_types": layer_types(reader, common["num_hidden_layers"]),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
            "full_attention": {"rope_type": "default", "rope_theta": theta},
        },
        "final_logit_softcapping": reader.number("final_logit_softcapping", 0.0) or None,
    }


def _check_shared(num_shared: int, kinds: list[str]) -> None:
    """Refuse layers that share keys with no layer of their kind; the code of `transformers` only fails."""
    own = kinds[: len(kinds) - num_shared]
    check(
        0 <= num_shared < len(kinds) and set(own) == set(kinds),
        f"attention.shared_kv_layers is {num_shared}, which leaves no layer to share with",
    )


def _by_kind(reader: Reader, key: str, kinds: list[str]) -> dict[str, int]:
    """Return a size of each kind of layer, which all of its layers must have."""
    values = per_layer(reader, key, len(kinds))
    found = {"sliding_attention": values[0], **dict(zip(kinds, values, strict=True))}
    check(
        values == [found[kind] for kind in kinds],
        f"`{key}` differs between layers of one kind: {str(values)[:100]}",
    )
    return found


def _turned_share(file: GgufFile) -> float:
    """Return which part of a head's pairs is turned: the others' frequencies are divided by 1e30."""
    if _ROPE_FREQS not in file.tensors:
        return 1.0
    info = file.tensor(_ROPE_FREQS)
    check(info.type == "F32", f"{_ROPE_FREQS} must hold floats")
    factors = file.raw(_ROPE_FREQS).view(np.float32)
    count = int((factors == 1.0).sum())
    is_known = bool((factors[:count] == 1.0).all() and (factors[count:] >= 1e20).all())
    check(count > 0 and is_known, f"{_ROPE_FREQS} must hold ones, then values that stop the turning")
    return count / factors.size


def _sparsities(reader: Reader, num_layers: int) -> list[float]:
    """Return the share of an MLP's gates that each layer sets to zero; the file has its normal quantile."""
    given = reader.get("activation_sparsity_scale")
    check(
        isinstance(given, list) and len(given) == num_layers and all(type(each) is float for each in given),
        f"activation_sparsity_scale must be a list of {num_layers} numbers",
    )
    normal = statistics.NormalDist()
    return [normal.cdf(each) for each in given]


MODULES = (
    GgufModule("gemma4", read_gemma4, GEMMA4_NAMES, unused=(_ROPE_FREQS,)),
    GgufModule("gemma3n", read_gemma3n, _GEMMA3N_NAMES),
)
