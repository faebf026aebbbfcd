"""OrionStar's Orion: Llama with LayerNorm.

Source: Chen et al., Orion-14B, arXiv 2401.12246, section 3.
"""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_orion(reader: Reader, architecture: str) -> ModelConfig:
    """Read Orion's configuration, which gives the LayerNorm's epsilon the name of an RMSNorm's."""
    reader.rename(layer_norm_eps=("rms_norm_eps",))
    sizes = read_sizes(reader, eps="layer_norm_eps", default_eps=1e-5)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        has_layer_norm=True,
        has_norm_bias=True,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


FAMILIES = (Family("OrionForCausalLM", "orion", read_orion, Decoder),)
