"""Weights of a GGUF file: translates llama.cpp's names to canonical ones and restores the row order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import GGUF_NAMES, Family
from tgi_asgi.models.loading.gguf_tensors import (
    GgufTensors,
    held_format,
    join_rotary_halves,
    without_ones,
)
from tgi_asgi.models.loading.weights import WHOLE, check_shape
from tgi_asgi.ops import FORMATS, WeightSource

# Parts of the tensor `attn_qkv`, which a file may have instead: rows of queries, of keys, then of values.
_PARTS = re.compile(r"(blk\.\d+\.)attn_([qkv])(\.weight|\.bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(name: str, names: Mapping[str, str | None]) -> str | None:
    """Translate a canonical name: model.layers.3.mlp.up_proj.weight becomes blk.3.ffn_up.weight.

    Args:
        names: llama.cpp's names, by canonical names without layer and kind; with the kind if llama.cpp has
            none.

    Returns:
        The name; None if llama.cpp has none.
    """
    whole = _LAYER.fullmatch(name)
    if whole is not None and whole[2] in names:
        return f"blk.{whole[1]}.{names[whole[2]]}"
    stem, _, kind = name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    found = names.get(layer[2] if layer else stem)
    if found is None:
        return None
    return f"blk.{layer[1]}.{found}.{kind}" if layer else f"{found}.{kind}"


class GgufWeights(GgufTensors):
    """The `Weights` of an open GGUF file that a native family computes."""

    def __init__(self, file: GgufFile, config: ModelConfig, family: Family) -> None:
        super().__init__(file)
        self._head_dim = config.head_dim
        num_queries = config.num_heads * (2 if config.has_output_gate else 1)
        self._qkv_rows = (num_queries + 2 * config.num_kv_heads) * config.head_dim
        self._names = {**GGUF_NAMES, **family.gguf_names}
        self._is_rotary_permuted = family.is_rotary_permuted

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name)[0] in self._file.tensors

    def _find(self, name: str) -> tuple[str | None, str]:
        """Return the tensor that holds a canonical one, and as which part: q, k or v, or "" if as its own."""
        stored = gguf_name(name, self._names)
        part = None if stored is None or stored in self._file.tensors else _PARTS.fullmatch(stored)
        if part is not None and (whole := f"{part[1]}attn_qkv{part[3]}") in self._file.tensors:
            return whole, part[2]
        return stored, ""

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        stored, of_whole = self._find(name)
        if stored is None:
            raise ModelLoadError(f"GGUF files have no name for the tensor {name!r}, which the model needs")
        info = self._file.tensor(stored)
        whole_shape, first = shape, 0
        if of_whole:
            whole_shape = (self._qkv_rows, *shape[1:])
            first = {"q": 0, "k": self._qkv_rows - 2 * shape[0], "v": self._qkv_rows - shape[0]}[of_whole]
        if without_ones(info.shape) != without_ones(whole_shape):
            check_shape(info.name, info.shape, whole_shape)
        start, stop, _ = part.indices(shape[0])
        data = self._rows(info, first + start, first + stop, whole_shape[0])
        shape = (stop - start, *shape[1:])
        if self._is_rotary_permuted and (".q_proj." in name or ".k_proj." in name):
            data = join_rotary_halves(data, shape[0], self._head_dim)
        return self._source(info, data, shape, start)

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`."""
        return {
            name: (held_format(info.type), math.prod(info.shape)) for name, info in self._file.tensors.items()
        }

    def block_columns(self, name: str) -> int:
        """Return how many columns of a matrix must stay together when it is cut; 1 if it does not exist."""
        stored, _ = self._find(name)
        if stored not in self._file.tensors:
            return 1
        assert stored is not None
        return FORMATS[held_format(self._file.tensor(stored).type)].block_columns
