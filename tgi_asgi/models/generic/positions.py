"""Where a module's positions begin, and how many its configuration names."""

from __future__ import annotations

from typing import Any

from tgi_asgi.models.config_bounds import MAX_CONTEXT
from tgi_asgi.models.generic.rope import stretched_context

_LONGEST = 1 << 17  # for models that name no length
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "seq_length",
    "max_seq_len",
    "n_positions",
    "n_ctx",
    "max_target_positions",
    "context_length",
)
_POSITION_METHODS = ("create_position_ids_from_input_ids", "create_position_ids_from_inputs_embeds")


def first_position(model: Any) -> int:
    """Return a sequence's first position: RoBERTa and its variants start after the padding id."""
    for module in model.modules():
        if any(hasattr(module, name) for name in _POSITION_METHODS):
            return int(module.padding_idx) + 1
    return 0


def context_length(config: Any) -> int:
    """Return the number of positions that a configuration names, or those to which it stretches them."""
    named = (getattr(config, name, None) for name in _CONTEXT_NAMES)
    found = next((value for value in named if type(value) is int and value > 0), _LONGEST)
    return min(max(found, stretched_context(config, found)), MAX_CONTEXT)
