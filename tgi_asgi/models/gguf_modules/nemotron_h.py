"""NVIDIA's Nemotron-H and Nemotron 3: layers of Mamba 2, attention without positions, and MLPs or experts."""

from __future__ import annotations

from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.gguf_module import (
    MAX_SIZE,
    GgufModule,
    common_names,
    log_of_decay,
    per_layer,
    read_common,
    read_routing,
)
from tgi_asgi.models.reader import Reader


def read_nemotron_h(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration."""
    config = read_common(reader)
    has_experts = any(".ffn_up_exps." in name for name in reader.tensors)
    if not has_experts:
        reader.ignore("n_routed_experts", "n_group", "topk_group")
    return {
        **config,
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "layer_norm_epsilon": reader.number("rms_norm_eps", reader.number("layer_norm_eps", 1e-5)),
        "mlp_bias": any(name.endswith(".ffn_up.bias") for name in reader.tensors),
        **_attention(reader),
        **_layers(reader, has_experts=has_experts),
        **_mamba(reader),
        **(_experts(reader) if has_experts else {}),
    }


def _attention(reader: Reader) -> dict[str, Any]:
    """Return the heads of attention, which knows no positions, whatever the file says of rotary ones."""
    head_dim = reader.positive("head_dim", MAX_SIZE)
    reader.ignore("rope.dimension_count", "rope.freq_base", "rope.scaling.finetuned")
    reader.require(**{"attention.value_length": head_dim})
    return {"head_dim": head_dim}


def _layers(reader: Reader, *, has_experts: bool) -> dict[str, Any]:
    """Return what each layer is, by its numbers of heads and of an MLP's rows."""
    num_stored = reader.integer("num_hidden_layers")
    num_layers = num_stored - reader.integer("num_nextn_predict_layers", 0)
    check(num_layers > 0, f"nextn_predict_layers leaves {num_layers} layers")
    heads = per_layer(reader, "num_key_value_heads", num_stored, least=0)[:num_layers]
    sizes = per_layer(reader, "intermediate_size", num_stored, least=0)[:num_layers]
    num_kv_heads, size = max(heads), max(sizes)
    kinds = [_kind(*each, has_experts=has_experts) for each in zip(heads, sizes, strict=True)]
    is_even = set(heads) <= {0, num_kv_heads} and set(sizes) <= {0, size}
    check(is_even, "layers of one kind must have the same sizes")
    return {
        "num_hidden_layers": num_layers,
        "layers_block_type": kinds,
        "num_key_value_heads": num_kv_heads or 1,
        "intermediate_size": size or 1,
    }


def _mamba(reader: Reader) -> dict[str, Any]:
    """Return the sizes of the recurrent layers."""
    num_heads = reader.positive("mamba_n_heads", MAX_SIZE)
    inner_size = reader.positive("ssm.inner_size", MAX_SIZE)
    check(inner_size % num_heads == 0, f"ssm.inner_size {inner_size} must be whole heads")
    return {
        "mamba_num_heads": num_heads,
        "mamba_head_dim": inner_size // num_heads,
        "n_groups": reader.positive("mamba_n_groups", num_heads),
        "ssm_state_size": reader.positive("mamba_d_state", MAX_SIZE),
        "conv_kernel": reader.positive("mamba_d_conv", MAX_SIZE),
        "use_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in reader.tensors),
        "use_bias": any(name.endswith(".ssm_in.bias") for name in reader.tensors),
    }


def _experts(reader: Reader) -> dict[str, Any]:
    """Return the experts' sizes, and how tokens are routed to them."""
    num_experts = reader.positive("n_routed_experts", MAX_SIZE)
    return {
        "n_routed_experts": num_experts,
        **read_routing(reader, num_experts),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "n_shared_experts": reader.positive("n_shared_experts", MAX_SIZE),
        "moe_shared_expert_intermediate_size": reader.positive("shared_expert_intermediate_size", MAX_SIZE),
        "moe_latent_size": reader.integer("moe_latent_size", 0) or None,
        "norm_topk_prob": reader.flag("norm_topk_prob", True),
        "routed_scaling_factor": reader.number("routed_scaling_factor", 1.0),
    }


def _kind(num_kv_heads: int, size: int, *, has_experts: bool) -> str:
    check(not (num_kv_heads and size), "a layer has attention or an MLP, not both")
    if num_kv_heads:
        return "full_attention"
    if size:
        return "moe" if has_experts else "mlp"
    return "linear_attention"


NAMES = {
    **common_names("lm_head"),
    "model.embeddings": "token_embd",
    "model.norm_f": "output_norm",
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm": "ssm_norm",
    "mixer.out_proj": "ssm_out",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    "mixer.gate": "ffn_gate_inp",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.experts.down_proj": "ffn_down_exps.weight",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
    "mixer.fc1_latent_proj": "ffn_latent_down",
    "mixer.fc2_latent_proj": "ffn_latent_up",
}
MODULES = tuple(
    GgufModule(name, read_nemotron_h, NAMES, restored={"ssm_a": log_of_decay})
    for name in ("nemotron_h", "nemotron_h_moe")
)
