"""OLMo 2 and 3: norms after attention and MLP instead of before, and over the full width of q and k.

Source: OLMo et al., 2 OLMo 2 Furious, arXiv 2501.00656, section 2.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import SANDWICH_NAMES, Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.layers import PostNormLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes, read_sliding
from tgi_asgi.models.reading_rope import read_ropes


def read_olmo2(reader: Reader, architecture: str) -> ModelConfig:
    """Read OLMo 2's configuration."""
    reader.defaults(rms_norm_eps=1e-5)
    # A GGUF file of this architecture may be OLMo 3's, which has a window.
    if reader.is_gguf and reader.get("sliding_window"):
        return read_olmo3(reader, architecture)
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture, layers=read_layers(reader, sizes), **_read_rest(reader, sizes)
    )


def read_olmo3(reader: Reader, architecture: str) -> ModelConfig:
    """Read OLMo 3's configuration: three of four layers have a window and an unstretched rotary embedding."""
    reader.defaults(rms_norm_eps=1e-5, sliding_window=4096)
    sizes = read_sizes(reader)
    window = reader.integer("sliding_window", 0) or None
    slides = read_sliding(reader, 4)
    ropes = read_ropes(reader, sizes["head_dim"], 5e5, 5e5)
    layers = read_layers(
        reader, sizes, windows=[window if each else None for each in slides],
        ropes=[ropes[each] for each in slides],
    )  # fmt: skip
    return ModelConfig(architecture=architecture, layers=layers, **_read_rest(reader, sizes))


def _read_rest(reader: Reader, sizes: dict[str, Any]) -> dict[str, Any]:
    biases = read_biases(reader, qkv="attention_bias", output="attention_bias")
    return {"has_qk_norm": True, **biases, **sizes}


class Olmo2Weights(LayerWeights):
    """A layer whose query and key norms span all heads."""

    has_whole_norms = True

    def norms(self) -> ops.HeadNorms:
        """Return the two norms, each of a product's full width."""
        config = self.config
        query = self.norm("self_attn.q_norm", config.num_heads * config.head_dim)
        key = self.norm("self_attn.k_norm", config.num_kv_heads * config.head_dim)
        return ops.HeadNorms(query, key, is_whole=True)


class Olmo2(Decoder):
    """The decoder with OLMo 2's layers."""

    layer_class = PostNormLayer
    weights_class = Olmo2Weights


FAMILIES = (
    Family("Olmo2ForCausalLM", "olmo2", read_olmo2, Olmo2, gguf_names=SANDWICH_NAMES),
    Family("Olmo3ForCausalLM", "olmo2", read_olmo3, Olmo2, gguf_names=SANDWICH_NAMES),
)
