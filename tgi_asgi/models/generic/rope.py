"""Rotary tables that depend on a batch are chosen once, by the longest context that is served.

`transformers` takes the longest position of a call to choose between tables ("longrope") or to compute one
("dynamic"): one long sequence would change all others, and a sequence its own past.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MOST_BYTES = 256 << 20  # of tables that are kept
_AT_ONCE = 4096  # positions whose angles are computed in one call
# The arguments of rotary embeddings that depend on nothing but positions.
_FORMS = (["x", "position_ids"], ["x", "position_ids", "layer_type"])


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


def tabulate(model: nn.Module, max_positions: int) -> None:
    """Compute what rotary embeddings give for each position once, and look it up in every step.

    Beside being faster, a token then has the same angles bit for bit wherever it stands in a batch: torch
    rounds sines otherwise at the end of a tensor than in its middle.
    """
    module: Any
    for module in model.modules():
        if "Rotary" not in type(module).__name__:
            continue
        if list(inspect.signature(module.forward).parameters) not in _FORMS:
            continue
        kinds = getattr(module, "rope_type", None)
        layer_types = list(kinds) if isinstance(kinds, dict) else [None]
        made = {each: _tables(module.forward, max_positions, each) for each in layer_types}
        tables = {each: found for each, found in made.items() if found is not None}
        if len(tables) == len(made):
            module.forward = RotaryLookup(module.forward, tables)


class RotaryLookup:
    """Stands for the `forward(x, position_ids)` of a rotary embedding.

    Args:
        own: what it stands for, where positions are more than one a token.
        tables: [max_positions, ...] each, by kind of layer (None: there is one kind).
    """

    def __init__(self, own: Callable[..., Any], tables: Mapping[Any, tuple[Tensor, ...]]) -> None:
        self._own, self._tables = own, tables

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: Any = None) -> Any:
        tables = self._tables.get(layer_type)
        if tables is None or position_ids.dim() != 2 or int(position_ids.max()) >= len(tables[0]):
            return self._own(x, position_ids, *(() if layer_type is None else (layer_type,)))
        found = tuple(table[position_ids] for table in tables)
        return found if len(found) > 1 else found[0]


def _tables(own: Callable[..., Any], max_positions: int, layer_type: Any) -> tuple[Tensor, ...] | None:
    """Return what `own` gives for each position; None where that is too large, or no tensor a position."""
    given = () if layer_type is None else (layer_type,)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, max_positions, _AT_ONCE):
        positions = torch.arange(start, start + _AT_ONCE)[None]
        try:
            made = own(torch.zeros(1), positions, *given)
        except Exception:  # whatever a class makes of such a call
            return None
        rows = made if isinstance(made, tuple) else (made,)
        if not all(isinstance(row, Tensor) and row.shape[:2] == positions.shape for row in rows):
            return None
        if sum(row.nbytes for row in rows) / _AT_ONCE * max_positions > _MOST_BYTES:
            return None
        parts.append(tuple(row[0] for row in rows))
    return tuple(torch.cat(each)[:max_positions] for each in zip(*parts, strict=True))
