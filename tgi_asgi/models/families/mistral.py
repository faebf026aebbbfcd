"""Mistral and Ministral: Llama without biases, with a window in all, some or no layers."""

from __future__ import annotations

from dataclasses import replace

from tgi_asgi.models.config import ModelConfig, QueryGrowth, RopeSpec
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import (
    default_rope,
    make_rope,
    num_layers,
    read_layers,
    read_rope,
    read_sizes,
    read_sliding,
    read_window,
    rope_values,
)

# transformers' defaults for Ministral 3 if the file says nothing of its rotary embedding.
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def read_mistral(reader: Reader, architecture: str) -> ModelConfig:
    """Read Mistral's configuration: one window for all layers or none; bias keys are ignored."""
    reader.ignore("attention_bias")
    reader.defaults(num_key_value_heads=8, sliding_window=4096)
    sizes = read_sizes(reader)
    layers = read_layers(reader, sizes, windows=read_window(reader))
    return ModelConfig(architecture=architecture, layers=layers, **sizes)


def read_ministral(reader: Reader, architecture: str) -> ModelConfig:
    """Read Ministral's configuration: a window in the layers that `layer_types` says, else in all."""
    reader.ignore("attention_bias", "use_sliding_window", "max_window_layers")
    reader.defaults(num_key_value_heads=8, sliding_window=4096)
    sizes = read_sizes(reader)
    window = reader.integer("sliding_window", 0) or None
    windows = [window if slides else None for slides in read_sliding(reader, num_layers(reader) + 1)]
    return ModelConfig(architecture=architecture, layers=read_layers(reader, sizes, windows=windows), **sizes)


def read_ministral3(reader: Reader, architecture: str) -> ModelConfig:
    """Read Ministral 3's configuration; its queries grow with each multiple of the original training context.

    llama.cpp uses the same name for Mistral Small 3.1 and later, whose queries do not grow.
    """
    reader.ignore("attention_bias")
    reader.defaults(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5)
    default_rope(reader, _YARN)
    sizes = read_sizes(reader)
    rope, beta = _read_growing_rope(reader, sizes["head_dim"])
    windows = read_window(reader)
    layers = read_layers(reader, sizes, windows=windows, ropes=[rope] * len(windows))
    if beta and rope.scaling is not None:
        growth = QueryGrowth(beta, rope.scaling.original_context)
        layers = tuple(replace(layer, query_growth=growth) for layer in layers)
    return ModelConfig(architecture=architecture, layers=layers, **sizes)


def _read_growing_rope(reader: Reader, head_dim: int) -> tuple[RopeSpec, float]:
    """Read the rotary embedding and the queries' growth, which config.json stores with it."""
    if reader.is_gguf:
        return read_rope(reader, head_dim), reader.number("attention.temperature_scale", 0.0)
    values = rope_values(reader)
    beta = Reader.of_json(values).number("llama_4_scaling_beta", 0.0)
    values.pop("llama_4_scaling_beta", None)
    return make_rope(reader, values, head_dim), beta


FAMILIES = (
    Family("MistralForCausalLM", "llama", read_mistral, Decoder, is_rotary_permuted=True),
    Family("MinistralForCausalLM", None, read_ministral, Decoder),
    Family("Ministral3ForCausalLM", "mistral3", read_ministral3, Decoder, is_rotary_permuted=True),
)
