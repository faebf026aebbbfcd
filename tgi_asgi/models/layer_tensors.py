"""The tensors of one layer, by their canonical names, and the values that are read from single ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading import WHOLE, Weights

Sources = list[ops.WeightSource]


def read_norm(
    config: ModelConfig, weights: Weights, name: str, *shape: int, eps: float | None = None
) -> ops.NormWeight:
    """Read a norm of the configured kind, of this shape or of the residual's width.

    Args:
        eps: What is added to the variance, if not the configuration's number.
    """
    shape = shape or (config.hidden_size,)
    eps = config.norm_eps if eps is None else eps
    columns = math.prod(shape)
    weight = bias = None
    if config.has_norm_weight:
        weight = ops.vector(weights.get(f"{name}.weight", shape)) + config.norm_offset
    if not config.has_layer_norm:
        return ops.NormWeight.rms(columns, eps, weight=weight)
    if config.has_norm_bias:
        bias = ops.vector(weights.get(f"{name}.bias", shape))
    return ops.NormWeight.layer(columns, eps, weight=weight, bias=bias)


class LayerTensors:
    """The tensors of one layer; the canonical names are those of `transformers`."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int, arithmetic: ops.Arithmetic) -> None:
        self.config, self.weights, self.arithmetic = config, weights, arithmetic
        self.spec, self.prefix = config.layers[index], f"model.layers.{index}."

    @property
    def is_gguf(self) -> bool:
        """Whether the weights come from a GGUF file."""
        return self.weights.is_gguf

    def get(self, name: str, *shape: int, part: slice = WHOLE) -> ops.WeightSource:
        """Return a tensor of this layer, or a part of it as described in `Weights.get`."""
        return self.weights.get(f"{self.prefix}{name}", shape, part)

    def has(self, name: str) -> bool:
        """Return whether this layer has the tensor."""
        return f"{self.prefix}{name}" in self.weights

    def norm(self, name: str, *shape: int, eps: float | None = None) -> ops.NormWeight:
        """Return a norm of this layer, of the residual's width and with the usual epsilon by default."""
        return read_norm(self.config, self.weights, f"{self.prefix}{name}", *shape, eps=eps)

    def cut(self, name: str, rows: Sequence[int], *columns: int) -> Sources:
        """Return the parts of a tensor (matrix or bias) that is several, one below the other."""
        fused = self.get(name, sum(rows), *columns)
        starts = [sum(rows[:index]) for index in range(len(rows))]
        return [fused.rows(start, start + count) for start, count in zip(starts, rows, strict=True)]

    def linear(self, name: str, rows: int, columns: int, *, has_bias: bool) -> ops.LinearWeight:
        """Make the weight of a single product, which every shard of a model computes as a whole."""
        bias = self.get(f"{name}.bias", rows) if has_bias else None
        return ops.linear_weight(self.get(f"{name}.weight", rows, columns), self.arithmetic, bias=bias)

    def linear_rows(
        self, name: str, rows: int, columns: int, part: range | None, *, has_bias: bool
    ) -> ops.LinearWeight:
        """Make the weight of a product of which a shard has these rows; None: all of them."""
        if part is None:
            return self.linear(name, rows, columns, has_bias=has_bias)
        bias = self.get(f"{name}.bias", rows).rows(part.start, part.stop) if has_bias else None
        source = self.get(f"{name}.weight", rows, columns).rows(part.start, part.stop)
        return ops.linear_weight(source, self.arithmetic, bias=bias)

    def linear_columns(
        self, name: str, rows: int, columns: int, part: range | None, *, has_bias: bool
    ) -> ops.LinearWeight:
        """Make the weight of a product of which a shard has these columns; None: all of them.

        The results of all shards are summed, so only the first one uses the bias, which all have to read.
        """
        cut = self.config.cut
        if part is None or cut is None:
            return self.linear(name, rows, columns, has_bias=has_bias)
        bias = self.get(f"{name}.bias", rows) if has_bias else None
        source = self.get(f"{name}.weight", rows, columns).columns(part.start, part.stop)
        return ops.linear_weight(
            source, self.arithmetic, bias=bias if cut.rank == 0 else None, is_partial=True
        )
