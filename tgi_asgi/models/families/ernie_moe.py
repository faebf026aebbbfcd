"""Baidu's ERNIE 4.5 with experts: adjacent dims rotate together, and routing is by corrected softmaxes."""

from __future__ import annotations

from tgi_asgi.errors import check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_experts import read_experts, with_experts


def read_ernie(reader: Reader, architecture: str) -> ModelConfig:
    """Read ERNIE's configuration; an MLP bias would also apply to dense layers and shared experts."""
    reader.rename(moe_k=("num_experts_per_tok",), moe_num_experts=("num_experts",))
    reader.defaults(
        rms_norm_eps=1e-5, num_key_value_heads=4, moe_intermediate_size=1536, moe_k=6, moe_num_experts=64,
        moe_num_shared_experts=2, rope_theta=500000.0, tie_word_embeddings=True,
    )  # fmt: skip
    sizes = read_sizes(reader)
    biases = read_biases(reader, qkv="use_bias", output="use_bias", mlp="use_bias")
    check_computed(not biases["has_mlp_bias"], "ERNIE with biases is not supported")
    reader.ignore("shared_expert_intermediate_size")  # llama.cpp's converter writes something else
    size = reader.integer("moe_intermediate_size")
    least = reader.number("moe_norm_min", 1e-12)
    check_computed(0 <= least <= 1e-9, f"moe_norm_min must be in 0..1e-9, got {least}")
    experts = read_experts(
        reader, count="moe_num_experts", top_k="moe_k", has_correction=True, is_renormalised=True,
        eps=least,
        shared_size=size * reader.integer("moe_num_shared_experts", 0),
    )  # fmt: skip
    first = 0 if reader.is_gguf else reader.integer("moe_layer_start_index", 1)
    last = -1 if reader.is_gguf else reader.integer("moe_layer_end_index", -1)
    step = 1 if reader.is_gguf else reader.integer("moe_layer_interval", 1)
    check(step >= 1, f"moe_layer_interval must be positive, got {step}")
    last = num_layers(reader) - 1 if last == -1 else last
    layers = read_layers(reader, sizes)
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(
            reader, layers, experts, lambda index: first <= index <= last and (index + 1) % step == 0
        ),
        has_interleaved_rope=True,
        **biases,
        **sizes,
    )


class ErnieWeights(LayerWeights):
    """A layer whose correction is a row, with Baidu's name or that of `transformers` 5."""

    expert_names = (
        ExpertNames(
            corrections=(
                "mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"
            ),
            is_correction_row=True,
        ),
    )  # fmt: skip


class Ernie(Decoder):
    """The decoder with ERNIE's weight names."""

    weights_class = ErnieWeights


# Layers for multi-token prediction, which only drafting would read.
_DRAFTING = ("model.mtp_*",)
FAMILIES = (Family("Ernie4_5_MoeForCausalLM", "ernie4_5-moe", read_ernie, Ernie, unused=_DRAFTING),)
