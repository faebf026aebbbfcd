"""Mistral's Mixtral: Mistral with routed experts."""

from __future__ import annotations

from dataclasses import replace

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.families.mistral import read_mistral
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import everywhere, read_mixtral_experts, with_experts


def read_mixtral(reader: Reader, architecture: str) -> ModelConfig:
    """Read Mixtral's configuration."""
    reader.defaults(
        rms_norm_eps=1e-5, rope_theta=1e6, num_experts_per_tok=2, num_local_experts=8, sliding_window=None
    )
    config = read_mistral(reader, architecture)
    reader.ignore("router_jitter_noise")  # training only
    layers = with_experts(reader, config.layers, read_mixtral_experts(reader), everywhere)
    return replace(config, layers=layers)


class MixtralWeights(LayerWeights):
    """A layer whose experts have the names of Mistral's files, or those of `transformers` 5."""

    expert_names = (
        ExpertNames(
            router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate="w1", up="w3", down="w2"
        ),
        ExpertNames(),
    )


class Mixtral(Decoder):
    """The decoder with Mixtral's expert names."""

    weights_class = MixtralWeights


FAMILIES = (Family("MixtralForCausalLM", None, read_mixtral, Mixtral),)
