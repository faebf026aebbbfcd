"""NVIDIA's Nemotron 3 and 4, and Minitron: LayerNorms of 1 + weight, squared ReLU without a gate.

Source: Parmar et al., Nemotron-4 15B, arXiv 2402.16819, section 2.
"""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_nemotron(reader: Reader, architecture: str) -> ModelConfig:
    """Read Nemotron's configuration."""
    reader.defaults(partial_rotary_factor=reader.get("rope_percent") or 0.5)
    eps = "layer_norm_eps" if reader.is_gguf else "norm_eps"
    if reader.is_gguf:
        reader.ignore("rms_norm_eps")  # llama.cpp's converter writes it in addition
    sizes = read_sizes(reader, eps=eps, default_eps=1e-5, activation="relu_squared")
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, has_partial_rotary=True),
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        norm_offset=0.0 if reader.is_gguf else 1.0,  # llama.cpp's converter has added it
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


FAMILIES = (Family("NemotronForCausalLM", "nemotron", read_nemotron, Decoder),)
