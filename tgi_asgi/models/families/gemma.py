"""Google's Gemma 1, 2 and 3 (text): norms of 1 + weight, gelu, and embeddings times the root of their size.

Sources: Gemma Team, Gemma 2, arXiv 2408.00118, section 2; Gemma 3, arXiv 2503.19786, section 2.
"""

from __future__ import annotations

import math
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import SANDWICH_NAMES, Family
from tgi_asgi.models.layers import SandwichLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes, read_sliding
from tgi_asgi.models.reading_rope import read_ropes

# llama.cpp recognises the models whose attention scale does not use the head size by their number of layers.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def read_gemma(reader: Reader, architecture: str) -> ModelConfig:
    """Read Gemma 1's configuration; the first files say gelu but mean its tanh form."""
    for key in ("hidden_act", "hidden_activation"):
        known = reader.get(key) in (None, "gelu", "gelu_pytorch_tanh")
        check_computed(
            known, f"{key} {str(reader.get(key))[:100]!r} is not supported, only gelu_pytorch_tanh is"
        )
    reader = reader.without("hidden_act", "hidden_activation")
    common = _read_common(reader)
    return ModelConfig(architecture=architecture, layers=read_layers(reader, common), **common)


def read_gemma2(reader: Reader, architecture: str) -> ModelConfig:
    """Read Gemma 2's configuration: every other layer has a window, scores and logits are capped."""
    reader.drop("hidden_act")
    reader.rename(hidden_act=("hidden_activation",))
    reader.ignore("sliding_window_size")  # an earlier name, which 9B's and 27B's files still have
    reader.defaults(
        num_key_value_heads=4, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
    )
    common = _read_common(reader)
    window = reader.integer("sliding_window", 4096) or None
    # The first GGUF files lack both caps, which the models have.
    soft_cap, cap = (50.0, 30.0) if reader.is_gguf else (0.0, 0.0)
    layers = read_layers(
        reader,
        common,
        windows=[window if slides else None for slides in read_sliding(reader, 2)],
        scale=_read_scale(reader, "gemma2", common),
        soft_cap=reader.number("attn_logit_softcapping", soft_cap) or None,
    )
    cap = reader.number("final_logit_softcapping", cap)
    return ModelConfig(architecture=architecture, layers=layers, logits_cap=cap, **common)


def read_gemma3(reader: Reader, architecture: str) -> ModelConfig:
    """Read Gemma 3's configuration: layers with a window have their own rotary embedding."""
    reader.drop("hidden_act")
    reader.rename(hidden_act=("hidden_activation",))
    reader.defaults(num_key_value_heads=4, sliding_window=4096)
    check_computed(
        not reader.number("attn_logit_softcapping", 0.0),
        "attn_logit_softcapping is given, which the code of Gemma 3 ignores",
    )
    reader.require(**{"rope.scaling.attn_factor": 1.0})  # llama.cpp scales both rotary embeddings by it
    common = _read_common(reader)
    window = reader.integer("sliding_window", 0) or None
    slides = [window is not None and each for each in read_sliding(reader, 6)]
    ropes = read_ropes(reader, common["head_dim"], 1e6, 1e4)
    layers = read_layers(
        reader,
        common,
        windows=[window if each else None for each in slides],
        ropes=[ropes[each] for each in slides],
        scale=_read_scale(reader, "gemma3", common),
    )
    cap = reader.number("final_logit_softcapping", 0.0)
    return ModelConfig(architecture=architecture, layers=layers, logits_cap=cap, has_qk_norm=True, **common)


def _read_common(reader: Reader) -> dict[str, Any]:
    reader.defaults(tie_word_embeddings=True, head_dim=256, rms_norm_eps=1e-6)
    sizes = read_sizes(reader, activation="gelu_tanh")
    return {
        **sizes,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        "embedding_factor": sizes["hidden_size"] ** 0.5,
        "norm_offset": 0.0 if reader.is_gguf else 1.0,  # llama.cpp's converter has added it
    }


def _read_scale(reader: Reader, gguf_name: str, sizes: dict[str, Any]) -> float:
    """Return the factor on attention scores."""
    if not reader.is_gguf:
        scalar = reader.number("query_pre_attn_scalar", 256)
        check(scalar > 0, f"query_pre_attn_scalar must be positive, got {scalar}")
        return 1 / math.sqrt(scalar)
    is_largest = num_layers(reader) == _LAYERS_OF_27B[gguf_name]
    size: int = sizes["hidden_size"] // sizes["num_heads"] if is_largest else sizes["head_dim"]
    return 1 / math.sqrt(size)


class Gemma2(Decoder):
    """The decoder with norms before and after each part, for Gemma 2 and 3."""

    layer_class = SandwichLayer


FAMILIES = (
    Family("GemmaForCausalLM", "gemma", read_gemma, Decoder),
    Family("Gemma2ForCausalLM", "gemma2", read_gemma2, Gemma2, gguf_names=SANDWICH_NAMES),
    Family("Gemma3ForCausalLM", "gemma3", read_gemma3, Gemma2, gguf_names=SANDWICH_NAMES),
)
