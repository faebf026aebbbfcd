"""Qwen 2 and 3: biases of q, k and v; norms per head; an optional window in the upper layers."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes, read_windows

# Of GGUF files of models that accept images: the axes of an image's positions, which are one for text, and
# how many layers an image's features are added to.
IMAGE_KEYS = ("rope.dimension_sections", "n_deepstack_layers")


def read_qwen2(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of Qwen 2 and 2.5; biases follow the model's code, whatever the file says."""
    reader.ignore("attention_bias", *IMAGE_KEYS)
    reader.defaults(num_key_value_heads=32, sliding_window=4096)
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, windows=_windows(reader)),
        has_qkv_bias=True,
        **sizes,
    )


def read_qwen3(reader: Reader, architecture: str) -> ModelConfig:
    """Read Qwen 3's configuration."""
    reader.ignore(*IMAGE_KEYS)
    reader.defaults(num_key_value_heads=32, head_dim=128, sliding_window=4096)
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, windows=_windows(reader)),
        has_qk_norm=True,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


def _windows(reader: Reader) -> list[int | None]:
    first = reader.integer("max_window_layers", 28)
    return read_windows(reader, [index >= first for index in range(num_layers(reader))])


FAMILIES = (
    Family("Qwen2ForCausalLM", "qwen2", read_qwen2, Decoder, other_gguf_names=("qwen2vl",)),
    Family("Qwen3ForCausalLM", "qwen3", read_qwen3, Decoder, other_gguf_names=("qwen3vl",)),
)
