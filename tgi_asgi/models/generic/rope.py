"""Rotary tables that would depend on the batch are fixed once, for the longest context served.

`transformers` uses the longest position in a call to choose between tables ("longrope") or to compute one
("dynamic"). One long sequence would then change all others, and a growing sequence its own past.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_STRETCH
from tgi_asgi.settings import GivenRope

_MAX_BYTES = 256 << 20  # limit for all tables of a model
_AT_ONCE = 4096  # positions whose angles are computed per call
# Signatures of rotary embeddings that depend only on positions.
_FORMS = (["x", "position_ids"], ["x", "position_ids", "layer_type"])


def scale_positions(config: Any, rope: GivenRope) -> None:
    """Set a `transformers` configuration's position scaling, and the resulting context length.

    If layers have several kinds of rotary embeddings, only those without a window are scaled.

    Raises:
        ModelLoadError: if the model has no rotary embedding that can be scaled.
    """
    given = getattr(config, "rope_parameters", None)
    context = getattr(config, "max_position_embeddings", None)
    if not given or type(context) is not int:
        raise ModelLoadError(
            f"--rope-scaling: models of type {config.model_type!r} have no rotary embedding that it can scale"
        )
    kinds = [name for name, value in given.items() if isinstance(value, dict)]
    scaled = [name for name in kinds if "sliding" not in name] or kinds
    first = given[scaled[0]] if kinds else given
    context = int(first.get("original_max_position_embeddings") or context)
    changed = {"rope_type": "default" if rope.kind == "none" else rope.kind, "factor": rope.factor}
    changed["original_max_position_embeddings"] = context
    if kinds:
        made = {name: _scaled(given[name], changed) if name in scaled else given[name] for name in kinds}
    else:
        made = _scaled(given, changed)
    config.rope_parameters = made
    # A dynamic table is computed from the context length before scaling.
    config.max_position_embeddings = context if rope.kind == "dynamic" else int(context * rope.factor)


def stretched_context(config: Any, context: int) -> int:
    """Return the context to which a configuration's linear or YaRN scaling extends `context`.

    See `models/rope.py`, which does the same for native families.

    Raises:
        ModelLoadError: if the factor is not a positive number, or larger than native families accept.
    """
    found = getattr(config, "rope_parameters", None)
    given: dict[str, Any] = found if isinstance(found, dict) else {}
    kind, factor = given.get("rope_type"), given.get("factor")
    if kind not in ("linear", "yarn") or not isinstance(factor, int | float):
        return context
    check(
        0 < factor <= MAX_STRETCH,
        f"the rope scaling factor must be positive and at most {MAX_STRETCH}, got {factor}",
    )
    original = given.get("original_max_position_embeddings") or context
    return int(max(min(original, MAX_CONTEXT), 0) * factor) if type(original) is int else context


def _scaled(given: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: given[name] for name in ("rope_theta", "partial_rotary_factor") if name in given}
    return {**kept, **changed} if changed["rope_type"] != "default" else {**kept, "rope_type": "default"}


def is_dynamic(model: nn.Module) -> bool:
    """Return whether a model's rotary embeddings are computed from the context length."""
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    names = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(isinstance(name, str) and "dynamic" in name for name in names)


def fix_rotary_tables(model: nn.Module, max_positions: int) -> None:
    """Make each rotary embedding of a model use one table for all positions of all steps."""
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
    """Compute the rotary embeddings of all positions once, and look them up in every step.

    This is faster. It also gives a token the same angles bit for bit wherever it is in a batch: torch rounds
    sines differently at the end of a tensor than in its middle.
    """
    room = _MAX_BYTES
    for module in _embeddings(model):
        made = {each: _tables(module.forward, max_positions, each, room) for each in _kinds(module)}
        tables = {each: found for each, found in made.items() if found is not None}
        needed = sum(table.nbytes for found in tables.values() for table in found)
        if len(tables) == len(made) and needed <= room:
            module.forward = RotaryLookup(module.forward, tables)
            room -= needed


def table_bytes(model: nn.Module, max_positions: int) -> int:
    """Return the approximate bytes of `tabulate`'s tables: a cosine and a sine per rotated dim of a head."""
    each = 0
    for module in _embeddings(model):
        for kind in _kinds(module):
            frequencies = getattr(module, "inv_freq" if kind is None else f"{kind}_inv_freq", None)
            each += 0 if frequencies is None else 2 * 4 * 2 * frequencies.numel()  # of half of the dims
    return min(each * max_positions, _MAX_BYTES)


def _embeddings(model: nn.Module) -> list[Any]:
    """Return the rotary embeddings that lookups could replace."""
    return [
        module
        for module in model.modules()
        if "Rotary" in type(module).__name__ and list(inspect.signature(module.forward).parameters) in _FORMS
    ]


def _kinds(module: Any) -> list[str | None]:
    """Return the layer types for which an embedding has tables; None: there is one kind."""
    kinds = getattr(module, "rope_type", None)
    return list(kinds) if isinstance(kinds, dict) else [None]


class RotaryLookup:
    """Replaces a rotary embedding's `forward(x, position_ids)`.

    Args:
        own: The original, used for positions outside the tables or with several axes.
        tables: [max_positions, ...] each, by layer type (None: there is one kind).
    """

    def __init__(self, own: Callable[..., Any], tables: Mapping[Any, tuple[Tensor, ...]]) -> None:
        self._own, self._tables = own, tables

    def move(self, device: torch.device) -> None:
        """Move the tables to a device."""
        self._tables = {
            each: tuple(table.to(device) for table in tables) for each, tables in self._tables.items()
        }

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: Any = None) -> Any:
        tables = self._tables.get(layer_type)
        if tables is None or position_ids.dim() != 2 or int(position_ids.max()) >= len(tables[0]):
            return self._own(x, position_ids, *(() if layer_type is None else (layer_type,)))
        found = tuple(table[position_ids] for table in tables)
        return found if len(found) > 1 else found[0]


def _tables(
    own: Callable[..., Any], max_positions: int, layer_type: Any, max_bytes: int
) -> tuple[Tensor, ...] | None:
    """Return `own`'s result for each position; None if it is too large or has no tensor per position."""
    given = () if layer_type is None else (layer_type,)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, max_positions, _AT_ONCE):
        positions = torch.arange(start, min(start + _AT_ONCE, max_positions))[None]
        try:
            made = own(torch.zeros(1), positions, *given)
        except Exception:  # a class may raise anything on such a call
            return None
        rows = made if isinstance(made, tuple) else (made,)
        if not all(isinstance(row, Tensor) and row.shape[:2] == positions.shape for row in rows):
            return None
        if sum(row.nbytes for row in rows) / positions.shape[1] * max_positions > max_bytes:
            return None
        parts.append(tuple(row[0] for row in rows))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))
