"""Liquid AI's LFM2 and LFM2-MoE: most layers have a gated short convolution instead of attention.

Source: Liquid AI, LFM2 Technical Report, arXiv 2511.23404.
"""

from __future__ import annotations

from dataclasses import replace

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import check_layer_types, num_layers, read_kv_heads, read_layers, read_sizes
from tgi_asgi.models.reading_experts import (
    check_sigmoid,
    has_corrections,
    read_experts,
    read_scale,
    with_experts,
)
from tgi_asgi.models.recurrent_specs import ShortConvSpec

# Keys of the first LFM2 files; LFM2's code in `transformers` reads none of them.
_TRAINING = ("block_norm_eps", "block_mlp_init_scale", "block_out_init_scale", "rms_norm_eps")
_KINDS = ("conv", "full_attention")


def read_lfm2(reader: Reader, architecture: str) -> ModelConfig:
    """Read LFM2's configuration; the MLP may be narrower than the file says."""
    reader.rename(intermediate_size=("block_ff_dim",))
    config = _read(reader, architecture)
    if not reader.is_gguf:
        config = replace(config, intermediate_size=_adjusted(reader, config.intermediate_size))
    return config


def read_lfm2_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read LFM2-MoE's configuration: sigmoid routing, corrected for the selection, after the first layers."""
    check_sigmoid(reader)
    config = _read(reader, architecture)
    has_correction = has_corrections(reader) if reader.is_gguf else reader.flag("use_expert_bias", True)
    reader.defaults(num_experts=32, num_experts_per_tok=4, moe_intermediate_size=1792)
    experts = read_experts(
        reader, count="num_experts", top_k="num_experts_per_tok", kind="sigmoid",
        has_correction=has_correction, is_renormalised=reader.flag("norm_topk_prob", True), eps=1e-6,
        scale=read_scale(reader),
    )  # fmt: skip
    first = 0 if reader.is_gguf else reader.integer("num_dense_layers", 2)
    return replace(config, layers=with_experts(reader, config.layers, experts, lambda index: index >= first))


def _read(reader: Reader, architecture: str) -> ModelConfig:
    reader.ignore(*(() if reader.is_gguf else _TRAINING))
    reader.drop("hidden_act")
    reader.defaults(rope_theta=1e6, conv_L_cache=3, num_key_value_heads=8)
    kinds = _read_kinds(reader)
    if reader.is_gguf:
        read_kv_heads(reader, [kind != "conv" for kind in kinds])
    else:
        tied = reader.flag("tie_embedding", reader.flag("tie_word_embeddings", True))
        reader.replace("tie_word_embeddings", tied)
    sizes = read_sizes(reader, eps="rms_norm_eps" if reader.is_gguf else "norm_eps", default_eps=1e-5)
    conv = ShortConvSpec(sizes["hidden_size"], reader.integer("conv_L_cache"), _has_bias(reader))
    return ModelConfig(
        architecture=architecture,
        layers=tuple(
            replace(layer, rope=None, recurrent=conv) if kind == "conv" else layer
            for kind, layer in zip(kinds, read_layers(reader, sizes), strict=True)
        ),
        has_qk_norm=True,
        **sizes,
    )


def _read_kinds(reader: Reader) -> list[str]:
    """Return each layer's kind; a GGUF file's tensors show it, older files list the attention layers."""
    count = num_layers(reader)
    if reader.is_gguf:
        return [_KINDS[f"blk.{index}.shortconv.conv.weight" not in reader.tensors] for index in range(count)]
    kinds, attending = reader.get("layer_types"), reader.get("full_attn_idxs")
    if kinds is None:
        is_list = isinstance(attending, list) and all(type(index) is int for index in attending)
        check(attending is None or is_list, "full_attn_idxs must be a list of integers")
        return [_KINDS[attending is None or index in attending] for index in range(count)]
    return check_layer_types(kinds, count, _KINDS)


def _has_bias(reader: Reader) -> bool:
    if reader.is_gguf:
        return any(name.endswith(".shortconv.conv.bias") for name in reader.tensors)
    return reader.flag("conv_bias", False)


def _adjusted(reader: Reader, size: int) -> int:
    """Return the MLP's size as the model's code computes it: two thirds, rounded up to a multiple."""
    multiplier, unit = (
        reader.number("block_ffn_dim_multiplier", 1.0),
        reader.integer("block_multiple_of", 256),
    )
    check(unit >= 1, f"block_multiple_of must be positive, got {unit}")
    check(0 < multiplier <= 1e6, f"block_ffn_dim_multiplier must be in (0, 1e6], got {multiplier}")
    if not reader.flag("block_auto_adjust_ff_dim", True):
        return size
    return -(-int(multiplier * int(2 * size / 3)) // unit) * unit


class Lfm2Weights(LayerWeights):
    """A layer whose experts have Mixtral's names."""

    expert_names = (
        ExpertNames(
            router="feed_forward.gate",
            corrections=("feed_forward.expert_bias",),
            experts="feed_forward.experts",
            gate="w1",
            up="w3",
            down="w2",
            joined="feed_forward.experts.gate_up_proj",
            joined_down="feed_forward.experts.down_proj",
        ),
        ExpertNames(),
    )


class Lfm2(Decoder):
    """The decoder with LFM2's weight names."""

    weights_class = Lfm2Weights
    checkpoint = CheckpointLayout(
        names={
            "model.norm": "model.embedding_norm",
            "input_layernorm": "operator_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        }
    )


_GGUF_NAMES = {
    "model.norm": "token_embd_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
}
FAMILIES = (
    Family("Lfm2ForCausalLM", "lfm2", read_lfm2, Lfm2, gguf_names=_GGUF_NAMES),
    Family("Lfm2MoeForCausalLM", "lfm2moe", read_lfm2_moe, Lfm2, gguf_names=_GGUF_NAMES),
)
