"""Cuts the targets of adapters to a shard's part of a model, as `cutting.py` cuts its weights.

    q, k, v, gate, up   rows of the shard      `down` whole, its rows of `up`
    o, down             columns of the shard   its columns of `down`, `up` whole: part of the partial sum

What adapters add to a product is thus where the product is, and the shards communicate no more than without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.models.cutting import of_heads, qkv_rows
from tgi_asgi.models.layers import Layer
from tgi_asgi.models.shard import ModelCut

_Rows = npt.NDArray[np.int64]


class TargetCut:
    """Cuts targets that name rows of whole weights to a shard's part of these weights.

    Args:
        layers: The layers, whose weights are cut.
    """

    def __init__(self, layers: Iterable[Layer], cut: ModelCut) -> None:
        self._rows: dict[int, _Rows] = {}  # by the weight's id: the rows of the whole weight that it has
        self._columns: dict[int, tuple[range, int]] = {}  # the same of columns, and how many the whole has
        for layer in layers:
            self._add(layer, cut)

    def __call__(self, target: ops.Target) -> ops.Target:
        """Return the target's part; a target that is not cut is returned as it is."""
        key, (rows, columns) = id(target.weight), target.shape
        if key in self._columns:
            part, columns = self._columns[key]
            return replace(target, columns=part, uncut=(rows, columns))
        held = self._rows.get(key)
        if held is None:
            return target
        (own,) = np.nonzero((held >= target.start) & (held < target.stop))  # adjacent, as the targets are
        order = held[own] - target.start
        return replace(
            target,
            start=int(own[0]),
            stop=int(own[-1]) + 1,
            order=order if target.order is None else target.order[order],
            uncut=(rows, columns),
        )

    def _add(self, layer: Layer, cut: ModelCut) -> None:
        config, latent = layer.config, layer.spec.latent
        num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if layer.spec.attends:
            width = config.head_dim if latent is None else latent.value_dim
            self._columns[id(layer.output)] = of_heads(cut.heads, width), config.num_heads * width
        if layer.spec.attends and latent is None:  # latent attention cuts its own targets
            firsts = (0, num_queries, num_queries + num_keys)
            self._rows[id(layer.qkv)] = _stacked(qkv_rows(cut, config.head_dim), firsts)
        if layer.has_mlp:
            starts = (0, config.intermediate_size) if isinstance(layer.up, ops.GateUpWeight) else (0,)
            self._rows[id(layer.up)] = _stacked([cut.inner] * len(starts), starts)
            self._columns[id(layer.down)] = cut.inner, config.intermediate_size


def _stacked(parts: Iterable[range], starts: Iterable[int]) -> _Rows:
    """Return the rows of matrices that are stacked with these first rows."""
    return np.concatenate([
        np.arange(part.start, part.stop) + start for part, start in zip(parts, starts, strict=True)
    ])  # fmt: skip
