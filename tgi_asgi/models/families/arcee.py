"""Arcee's AFM: Llama with an ungated squared-ReLU MLP."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_arcee(reader: Reader, architecture: str) -> ModelConfig:
    """Read AFM's configuration."""
    reader.defaults(rms_norm_eps=1e-5)
    sizes = read_sizes(reader, activation="relu_squared")
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        has_gate=False,
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


FAMILIES = (Family("ArceeForCausalLM", "arcee", read_arcee, Decoder, is_rotary_permuted=True),)
