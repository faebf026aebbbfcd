"""Models refused by name before any weight is read, because their code would compute something else here.

Each rule comes from an observed silent error: wrong logits that nothing reported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tgi_asgi.errors import ModelLoadError
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
    "BltForCausalLM": "groups bytes into patches, so attention sees fewer positions than tokens",
    "CpmAntForCausalLM": "lets a prompt's tokens see each other both ways",
    "DeepseekV4ForCausalLM": "holds tables of integers, and keeps compressed keys",
    "OpenAIGPTLMHeadModel": "has no cache to continue from",
    "ProphetNetForCausalLM": "predicts several tokens at once, by a table of positions",
    "RecurrentGemmaForCausalLM": "keeps its state in its modules, where one sequence has a place",
    "ReformerModelWithLMHead": "hashes tokens into buckets that change with the length",
    "RwkvForCausalLM": "has a state of a special kind",
    "UnlimitedOcrForConditionalGeneration": "lets what it writes see all of the prompt, whatever its window",
    "XLMWithLMHeadModel": "has no cache to continue from",
    "XLNetLMHeadModel": "continues from memories of its own",
    "xLSTMForCausalLM": "has a cache of its own kind",
}
# Uses whose result depends on how a prompt is split, even in the model's own cache.
_REFUSED = frozenset({"update_indexer"})
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
    if model.get_output_embeddings() is None:
        raise ModelLoadError(f"{name} has no head that computes token logits")
    is_pair = getattr(config, "is_encoder_decoder", False)
    is_decoder = is_pair or getattr(config.get_text_config(), "is_decoder", None)
    if is_decoder is False and _is_encoder_by_default(model):
        raise ModelLoadError(f"{name} is an encoder here: its config.json does not say `is_decoder`")
    _refuse_uses(model, _REFUSED.__contains__)


def check_cache_uses(model: nn.Module) -> None:
    """Refuse a module that keeps more state per sequence than keys, values and recurrent states.

    Raises:
        ModelLoadError: with the uses of its cache that are not supported.
    """
    _refuse_uses(model, lambda use: use not in _ALLOWED and use not in _RECURRENT)


def _refuse_uses(model: nn.Module, is_refused: Callable[[str], bool]) -> None:
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        found = sorted({use for use in _USE.findall(class_source(kind)) if is_refused(use)})
        if found:
            raise ModelLoadError(
                f"{kind.__name__} of transformers keeps more of a sequence than keys and values "
                f"({', '.join(found)})"
            )


def _is_encoder_by_default(model: nn.Module) -> bool:
    """Return whether a class attends in both directions unless its configuration says otherwise."""
    return "is_decoder" in inspect.getsource(type(model).__init__)
