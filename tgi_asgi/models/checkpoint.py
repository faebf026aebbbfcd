"""How checkpoints of a family keep what canonical names stand for, where that is not as Llama's do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tgi_asgi.models.config import ModelConfig

Rows = npt.NDArray[np.int64]
_LAYERS = "model.layers"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """Names, and what becomes of tensors as they are read; GGUF files are none of its business.

        CheckpointLayout(names={"model.layers": "transformer.h", "self_attn.o_proj": "attn.c_proj"})

    Attributes:
        names: of modules, by canonical ones: of the model, or behind a layer's number.
        is_transposed: matrices of layers lie [columns, rows], as GPT-2's `Conv1D` has them.
        part: what names may have behind `model.`, where that is a part of a model that sees images, too.
        row_order: returns for a canonical module which row of the file's tensor each of its rows is; None:
            they lie in order.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    is_transposed: bool = False
    part: str | None = None
    row_order: Callable[[ModelConfig, str], Rows | None] = lambda config, module: None

    @property
    def prefix(self) -> str:
        """What the names of all but the head begin with, unless the model was saved without its head."""
        return f"{self.names.get(_LAYERS, _LAYERS).rpartition('.')[0]}."

    def module(self, name: str) -> str:
        """Translate a canonical module: model.layers.3.self_attn.o_proj is transformer.h.3.attn.c_proj."""
        layer = _LAYER.fullmatch(name)
        if layer is None:
            return self.names.get(name, name)
        layers = self.names.get(_LAYERS, _LAYERS)
        return f"{layers}.{layer[1]}.{self.names.get(layer[2], layer[2])}"

    def tensor(self, name: str) -> str:
        """Translate a canonical tensor, which is a module's weight or bias."""
        module, _, kind = name.rpartition(".")
        return f"{self.module(module)}.{kind}"


def is_of_layer(name: str) -> bool:
    """Tell whether a canonical name is of a layer."""
    return _LAYER.fullmatch(name) is not None
