"""SmolLM 3: Llama without positions in every fourth layer (Yang et al., arXiv 2501.18795)."""

from __future__ import annotations

from tgi_asgi.errors import check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes, read_windows

_INTERVAL = 4


def read_smollm3(reader: Reader, architecture: str) -> ModelConfig:
    """Read SmolLM 3's configuration; GGUF files do not record which layers have no rotary embedding."""
    reader.defaults(num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True)
    reader.ignore("max_window_layers")
    if not reader.is_gguf and reader.get("layer_types") is not None:
        reader.replace("use_sliding_window", True)  # which only decides where `layer_types` is absent
    sizes = read_sizes(reader)
    has_rope = _has_rope(reader, num_layers(reader))
    windows = read_windows(reader, [not has for has in has_rope])
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, windows=windows, has_rope=has_rope),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


def _has_rope(reader: Reader, count: int) -> list[bool]:
    """Return whether each layer rotates; despite its name, `no_rope_layers` has a 1 for those that do."""
    interval = _INTERVAL if reader.is_gguf else reader.integer("no_rope_layer_interval", _INTERVAL)
    check(interval >= 1, f"no_rope_layer_interval must be positive, got {interval}")
    listed = None if reader.is_gguf else reader.get("no_rope_layers")
    if listed is None:
        return [(index + 1) % interval != 0 for index in range(count)]
    check(
        isinstance(listed, list) and len(listed) == count and all(value in (0, 1) for value in listed),
        f"no_rope_layers must be a list of {count} zeros and ones",
    )
    return [bool(value) for value in listed]


FAMILIES = (Family("SmolLM3ForCausalLM", "smollm3", read_smollm3, Decoder, is_rotary_permuted=True),)
