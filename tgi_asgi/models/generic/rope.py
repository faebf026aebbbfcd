"""Rotary tables that depend on a batch are chosen once, by the longest context that is served.

`transformers` takes the longest position of a call to choose between tables ("longrope") or to compute one
("dynamic"): one long sequence would change all others, and a sequence its own past.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def fix_rotary_tables(model: nn.Module, max_positions: int) -> None:
    """Have each rotary embedding of a model keep one table, whatever positions a step has."""
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and hasattr(module, "inv_freq"):
            _fix(module, kinds, None, max_positions)
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                _fix(module, kind, layer_type, max_positions)
            module.rope_type = dict.fromkeys(kinds, "default")


def _fix(module: Any, kind: str, layer_type: str | None, max_positions: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if "dynamic" not in kind and kind != "longrope":
        return
    options = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, "cpu", seq_len=max_positions, **options)
    prefix = "" if layer_type is None else f"{layer_type}_"
    setattr(module, f"{prefix}inv_freq", frequencies)
    setattr(module, f"{prefix}attention_scaling", scaling)
