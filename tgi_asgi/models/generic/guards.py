"""Models refused by name before any weight is read, because their code would compute something else here.

Others, found by what their code does with its cache, run one sequence at a time. Each rule comes from an
observed silent error: wrong logits that nothing reported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.own_cache import WITHOUT_CACHE, has_own_layers, makes_own_kind
from tgi_asgi.models.generic.source_code import class_source

# Uses of the cache that a module may make: keys, values, their number, and the sequences they belong to.
_ALLOWED = frozenset({
    "update", "get_seq_length", "layers", "is_updated", "is_sliding", "self_attention_cache",
    "cross_attention_cache", "get_mask_sizes", "get_query_offset", "is_compileable", "is_initialized",
    "to_legacy_cache", "from_legacy_cache", "get_max_length", "get_max_cache_shape", "crop", "shape",
    "device", "early_initialization",
})  # fmt: skip
_RECURRENT = frozenset({
    "update_conv_state", "update_recurrent_state", "get_conv_state", "get_recurrent_state",
    "is_recording_past", "has_previous_state", "get_linear_cache", "set_linear_cache", "key_cache",
    "value_cache", "conv_states", "recurrent_states", "has_conv_state",
})  # fmt: skip
# Architectures of `transformers` whose code cannot be served in steps, with the reason.
_KNOWN: Mapping[str, str] = {
    "CpmAntForCausalLM": "lets a prompt's tokens see each other both ways",
    "IdeficsForVisionText2Text": "reads images through cross-attention, of which only Mllama's is supported",
    "NemotronH_Omni_Reasoning_V3": "has a decoder with its own head next to the tower",
    "ProphetNetForCausalLM": "predicts several tokens at once, by a table of positions",
    "ReformerModelWithLMHead": "hashes tokens into buckets that change with the length",
    "UnlimitedOcrForConditionalGeneration": "lets what it writes see all of the prompt, whatever its window",
}
_USE = re.compile(r"(?<![.\w])(?:cache|past_key_values?|cache_params|layer_past|past_key_value)\.(\w+)")


def check_servable(model: Any) -> None:
    """Refuse a module that this server would run incorrectly.

    Raises:
        ModelLoadError: with the reason.
    """
    name = type(model).__name__
    config = model.config
    if name in _KNOWN:
        raise ModelLoadError(f"{name} cannot be served: it {_KNOWN[name]}")
    if name == "DogeForCausalLM" and config.is_moe:
        raise ModelLoadError(
            f"{name} with experts cannot be served: it routes a prompt's tokens by each other"
        )
    if model.get_output_embeddings() is None:
        raise ModelLoadError(f"{name} has no head that computes token logits")
    is_pair = getattr(config, "is_encoder_decoder", False)
    is_decoder = is_pair or getattr(config.get_text_config(), "is_decoder", None)
    if is_decoder is False and _is_encoder_by_default(model):
        raise ModelLoadError(f"{name} is an encoder here: its config.json does not say `is_decoder`")


def check_cache_uses(model: Any) -> None:
    """Refuse to batch a module that keeps more of a sequence than keys, values and recurrent states.

    Raises:
        ModelLoadError: with what it keeps, or why it keeps nothing.
    """
    name = type(model).__name__
    if name in WITHOUT_CACHE:
        raise ModelLoadError(f"{name} cannot continue a sequence: {WITHOUT_CACHE[name]}")
    if has_own_layers(model) or makes_own_kind(model):
        raise ModelLoadError(f"{name} has a cache of its own kind")
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        uses = set(_USE.findall(class_source(kind)))
        found = sorted(uses - _ALLOWED - _RECURRENT)
        if found:
            raise ModelLoadError(
                f"{kind.__name__} of transformers keeps more of a sequence than keys and values "
                f"({', '.join(found)})"
            )


def _is_encoder_by_default(model: Any) -> bool:
    """Return whether a class attends in both directions unless its configuration says otherwise."""
    return "is_decoder" in inspect.getsource(type(model).__init__)
