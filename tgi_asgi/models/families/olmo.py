"""OLMo 1: Llama with LayerNorms without weights, and clamped queries, keys and values.

Source: Groeneveld et al., OLMo, arXiv 2402.00838, section 2.1.
"""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_olmo(reader: Reader, architecture: str) -> ModelConfig:
    """Read OLMo 1's configuration; the norms' epsilon is fixed in the model's code."""
    reader.drop("layer_norm_eps")
    sizes = read_sizes(reader, eps="layer_norm_eps", default_eps=1e-5)
    clip = reader.number("clip_qkv", 0.0)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        has_layer_norm=True,
        has_norm_weight=False,
        clip=clip or None,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


FAMILIES = (Family("OlmoForCausalLM", "olmo", read_olmo, Decoder, is_rotary_permuted=True),)
