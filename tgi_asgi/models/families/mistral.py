"""Mistral and Ministral: Llama without biases, with a window of all layers, of some, or of none."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_layers, read_sizes, read_sliding, read_window


def read_mistral(reader: Reader, architecture: str) -> ModelConfig:
    """Read Mistral's: a window of all layers where it has one, no biases, whatever the file says."""
    reader.ignore("attention_bias")
    reader.defaults(num_key_value_heads=8, sliding_window=4096)
    sizes = read_sizes(reader)
    layers = read_layers(reader, sizes, windows=read_window(reader))
    return ModelConfig(architecture=architecture, layers=layers, **sizes)


def read_ministral(reader: Reader, architecture: str) -> ModelConfig:
    """Read Ministral's: a window of the layers that `layer_types` says, without that of all."""
    reader.ignore("attention_bias", "use_sliding_window", "max_window_layers")
    reader.defaults(num_key_value_heads=8, sliding_window=4096)
    sizes = read_sizes(reader)
    window = reader.integer("sliding_window", 0) or None
    windows = [window if slides else None for slides in read_sliding(reader, num_layers(reader) + 1)]
    return ModelConfig(architecture=architecture, layers=read_layers(reader, sizes, windows=windows), **sizes)


FAMILIES = (
    Family("MistralForCausalLM", "llama", read_mistral, Decoder, is_rotary_permuted=True),
    Family("MinistralForCausalLM", None, read_ministral, Decoder),
)
