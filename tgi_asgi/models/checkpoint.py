"""Describes how a family's checkpoints store canonical tensors, if not as Llama's do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tgi_asgi.models.config import ModelConfig

Rows = npt.NDArray[np.int64]
_LAYERS = "model.layers"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """Tensor names of a checkpoint, and how tensors change when read; not used for GGUF files.

        CheckpointLayout(names={"model.layers": "transformer.h", "self_attn.o_proj": "attn.c_proj"})

    Attributes:
        names: Module names by canonical name: of the whole model, or relative to a layer.
        is_transposed: Whether layers' matrices are stored as [columns, rows], as in GPT-2's `Conv1D`.
        part: Optional name component after `model.`, if the decoder is part of a vision model.
        other_prefixes: Prefixes that files may have instead of `prefix`.
        row_order: Returns, for a canonical module, the index in the file's tensor of each of its rows; None:
            in order.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    is_transposed: bool = False
    part: str | None = None
    other_prefixes: Sequence[str] = ()
    row_order: Callable[[ModelConfig, str], Rows | None] = lambda config, module: None

    @property
    def prefix(self) -> str:
        """The name prefix of everything except the head; absent if the model was saved without its head."""
        return f"{self.names.get(_LAYERS, _LAYERS).rpartition('.')[0]}."

    def module(self, name: str) -> str:
        """Translate a canonical module: model.layers.3.self_attn.o_proj to transformer.h.3.attn.c_proj."""
        layer = _LAYER.fullmatch(name)
        if layer is None:
            return self.names.get(name, name)
        layers = self.names.get(_LAYERS, _LAYERS)
        return f"{layers}.{layer[1]}.{self.names.get(layer[2], layer[2])}"

    def tensor(self, name: str) -> str:
        """Translate a canonical tensor name, which is a module's weight or bias."""
        module, _, kind = name.rpartition(".")
        return f"{self.module(module)}.{kind}"


def mlp_names(own: str, canonical: str = "mlp") -> dict[str, str]:
    """Return the names of a `CheckpointLayout` for an MLP that files call `own`."""
    return {f"{canonical}.{each}": f"{own}.{each}" for each in ("gate_proj", "up_proj", "down_proj")}


def shared_expert_names(own: str) -> dict[str, str]:
    """Return the names of a `CheckpointLayout` for a shared expert that files call otherwise."""
    return mlp_names(own, "mlp.shared_experts")


def is_of_layer(name: str) -> bool:
    """Return whether a canonical name belongs to a layer."""
    return _LAYER.fullmatch(name) is not None
