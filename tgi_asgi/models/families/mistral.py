"""Mistral and Ministral: Llama without biases, with a window in all, some or no layers."""

from __future__ import annotations

from dataclasses import replace

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec, QueryGrowth
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_layers, read_sizes, read_sliding, read_window
from tgi_asgi.models.reading_rope import default_rope, rope_values

_BETA = "llama_4_scaling_beta"  # of queries' growth, although among the settings of the rotary embedding
# transformers' defaults for Ministral 3 if the file says nothing of its rotary embedding.
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, _BETA: 0.1,
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
    layers = read_layers(
        reader, sizes, windows=read_window(reader), edit_rope=lambda values: values.pop(_BETA, None)
    )
    if reader.is_gguf:
        beta = reader.number("attention.temperature_scale", 0.0)
    else:
        beta = Reader.of_json(rope_values(reader)).number(_BETA, 0.0)
    layers = tuple(_growing(layer, beta) for layer in layers)
    return ModelConfig(architecture=architecture, layers=layers, **sizes)


def _growing(layer: LayerSpec, beta: float) -> LayerSpec:
    """Return a layer whose queries grow by `beta`; those without a scaled rotary embedding do not."""
    scaling = None if layer.rope is None else layer.rope.scaling
    if not beta or scaling is None:
        return layer
    return replace(layer, query_growth=QueryGrowth(beta, scaling.original_context))


FAMILIES = (
    Family("MistralForCausalLM", "llama", read_mistral, Decoder, is_rotary_permuted=True),
    Family("MinistralForCausalLM", None, read_ministral, Decoder),
    Family("Ministral3ForCausalLM", "mistral3", read_ministral3, Decoder, is_rotary_permuted=True),
)
