"""Microsoft's Phi 3.5 with experts: LayerNorms, biases, and routing by SparseMixer."""

from __future__ import annotations

from typing import Any

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes, read_window
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts


def read_phi_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read Phi's configuration; llama.cpp routes by softmax and stores no jitter, so 0.01 is assumed."""
    reader.defaults(
        rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=16, num_experts_per_tok=2, num_key_value_heads=8
    )
    sizes = read_sizes(reader)
    layers = read_layers(reader, sizes, windows=read_window(reader), edit_rope=_join_magnitudes)
    experts = read_experts(
        reader, count="num_local_experts", top_k="num_experts_per_tok", size="intermediate_size",
        kind="sparsemixer", jitter=0.01 if reader.is_gguf else reader.number("router_jitter_noise", 0.01),
    )  # fmt: skip
    check_computed(experts.top_k == 2, f"sparsemixer needs 2 experts per token, got {experts.top_k}")
    has_head_bias = "output.bias" in reader.tensors if reader.is_gguf else reader.flag("lm_head_bias", False)
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, experts, everywhere),
        has_layer_norm=True,
        has_norm_bias=True,
        has_head_bias=has_head_bias,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


def _join_magnitudes(values: dict[str, Any]) -> None:
    """Set the factor on cosines and sines, which has two keys here; they must be equal."""
    short, long = values.pop("short_mscale", None), values.pop("long_mscale", None)
    check_computed(
        short == long, f"short_mscale {short!r} and long_mscale {long!r} that differ are not supported"
    )
    if short is not None:
        values["attention_factor"] = short


class PhiMoeWeights(LayerWeights):
    """A layer whose experts have the names of Microsoft's files, or those of `transformers` 5."""

    expert_names = (
        ExpertNames(
            router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate="w1", up="w3", down="w2"
        ),
        ExpertNames(router="mlp.router"),
        ExpertNames(),
    )


class PhiMoe(Decoder):
    """The decoder with Phi's expert names."""

    weights_class = PhiMoeWeights


FAMILIES = tuple(  # names in Microsoft's files, and in those that `transformers` writes
    Family(name, "phimoe", read_phi_moe, PhiMoe) for name in ("PhiMoEForCausalLM", "PhimoeForCausalLM")
)
