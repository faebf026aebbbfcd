"""MiniCPM 1, 2 and 4: Llama with factors on embedding, residual and logits; one model has experts.

Source: Hu et al., MiniCPM, arXiv 2404.06395, section 3.
"""

from __future__ import annotations

import math

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts


def read_minicpm(reader: Reader, architecture: str) -> ModelConfig:
    """Read MiniCPM's configuration; GGUF files name the factors otherwise, and the first ones lack them.

    Attention is to all tokens: `sparse_config` (MiniCPM 4.1) describes kernels that skip blocks of long
    texts, which the model's own code uses only where they are installed.
    """
    reader.defaults(tie_word_embeddings=True)
    reader.ignore("sparse_config")
    sizes = read_sizes(reader)
    layers = read_layers(reader, sizes)
    if not reader.is_gguf and reader.integer("num_experts", 0):
        experts = read_experts(
            reader, count="num_experts", top_k="num_experts_per_tok", size="intermediate_size",
            is_renormalised=True,
        )  # fmt: skip
        layers = with_experts(reader, layers, experts, everywhere)
    embedding, residual, logits = _read_factors(reader, max(sizes["hidden_size"], 1))
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        embedding_factor=embedding,
        residual_factor=residual,
        logits_scale=logits,
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


def _read_factors(reader: Reader, width: int) -> tuple[float, float, float]:
    """Return the factors on embedding, residual and logits."""
    depth = math.sqrt(num_layers(reader))
    if reader.is_gguf:  # the first files are of MiniCPM 1 and 2, whose factors are these defaults
        return (
            reader.number("embedding_multiplier", 12.0),
            reader.number("residual_multiplier", 1.4 / depth),
            1.0 / (reader.number("logits_scaling", 0.0) or width / 256),
        )
    return (
        reader.number("scale_emb", 1.0),
        reader.number("scale_depth", 1.0) / depth,
        reader.number("dim_model_base", 1.0) / width,
    )


class MiniCpmWeights(LayerWeights):
    """A layer that may have experts under Mixtral's first names."""

    expert_names = (ExpertNames(gate="w1", up="w3", down="w2"),)


class MiniCpm(Decoder):
    """The decoder with these names of experts."""

    weights_class = MiniCpmWeights


FAMILIES = (Family("MiniCPMForCausalLM", "minicpm", read_minicpm, MiniCpm, is_rotary_permuted=True),)
