"""Baidu's dense ERNIE 4.5: Llama in which adjacent dims of a head rotate together."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_ernie4_5(reader: Reader, architecture: str) -> ModelConfig:
    """Read ERNIE 4.5's configuration; one key decides the biases of all products."""
    reader.defaults(
        rms_norm_eps=1e-5, head_dim=128, num_key_value_heads=2, rope_theta=500000.0, tie_word_embeddings=True
    )
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        has_interleaved_rope=True,
        **read_biases(reader, qkv="use_bias", output="use_bias", mlp="use_bias"),
        **sizes,
    )


# The second is the name in Baidu's own code.
FAMILIES = (
    Family("Ernie4_5ForCausalLM", "ernie4_5", read_ernie4_5, Decoder),
    Family("Ernie4_5_ForCausalLM", "ernie4_5", read_ernie4_5, Decoder),
)
