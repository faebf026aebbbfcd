"""LG's EXAONE 4: norms after attention and MLP, and per head; full-attention layers have no positions.

Source: LG AI Research, EXAONE 4.0, arXiv 2507.11407, section 2.1.
"""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import SANDWICH_NAMES, Family
from tgi_asgi.models.layers import PostNormLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_layers, read_sizes, read_sliding

_PATTERN = "LLLG"  # spelling in some files: local and global layers


def read_exaone4(reader: Reader, architecture: str) -> ModelConfig:
    """Read EXAONE 4's configuration; if it sets no window, all layers have full attention and positions."""
    reader.defaults(rms_norm_eps=1e-5, sliding_window=4096, num_key_value_heads=32)
    sizes = read_sizes(reader)
    window = reader.integer("sliding_window", 0) or None
    if window is None:
        reader.ignore("sliding_window_pattern", "layer_types")
        layers = read_layers(reader, sizes)
    else:
        slides = _read_sliding(reader)
        windows = [window if each else None for each in slides]
        layers = read_layers(reader, sizes, windows=windows, has_rope=slides)
    return ModelConfig(architecture=architecture, layers=layers, has_qk_norm=True, **sizes)


def _read_sliding(reader: Reader) -> list[bool]:
    pattern = reader.get("sliding_window_pattern")
    is_written = isinstance(pattern, str) and pattern != "" and set(pattern) <= set(_PATTERN)
    if is_written and reader.get("layer_types") is None:
        return [pattern[index % len(pattern)] == "L" for index in range(num_layers(reader))]
    return read_sliding(reader, 4)


class Exaone4(Decoder):
    """The decoder with norms after each part."""

    layer_class = PostNormLayer


FAMILIES = (Family("Exaone4ForCausalLM", "exaone4", read_exaone4, Exaone4, gguf_names=SANDWICH_NAMES),)
