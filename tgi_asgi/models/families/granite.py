"""IBM's Granite 3: Llama with constant factors on embedding, scores, residual and logits."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes


def read_granite(reader: Reader, architecture: str) -> ModelConfig:
    """Read Granite's configuration; `logits_scaling` divides the logits."""
    sizes = read_sizes(reader)
    default_scale = sizes["head_dim"] ** -0.5 if reader.is_gguf else 1.0  # default of each format's code
    scale = reader.number("attention_multiplier", default_scale)
    # The key by which llama.cpp's files record whether this architecture uses positions.
    has_rope = not reader.is_gguf or reader.flag("rope.scaling.finetuned", True)
    layers = read_layers(reader, sizes, scale=scale, has_rope=[has_rope] * num_layers(reader))
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        embedding_factor=reader.number("embedding_multiplier", 1.0),
        residual_factor=reader.number("residual_multiplier", 1.0),
        logits_scale=1.0 / (reader.number("logits_scaling", 1.0) or 1.0),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


FAMILIES = (Family("GraniteForCausalLM", "granite", read_granite, Decoder, is_rotary_permuted=True),)
