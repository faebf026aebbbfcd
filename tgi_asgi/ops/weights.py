"""Operator weights, made from the tensors that files hold.

`models/loading` wraps a tensor's bytes in a `WeightSource`, and a model calls a constructor here. The
device's arithmetic (`Packing` for a CPU, `Repacking` for CUDA) decides the resulting layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.layout import STRIP
from tgi_asgi.ops.norm_weight import HeadNorms
from tgi_asgi.ops.qkv_heads import QkvHeads
from tgi_asgi.ops.sources import WeightSource, decode


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A matrix W [rows, columns] for `a @ W.T (+ bias)`; also the table that `embed` gathers from."""

    rows: int
    columns: int
    made: Any  # the device's representation
    is_partial: bool = False  # has only some of the columns: the products of all shards are summed


@dataclass(frozen=True, slots=True)
class QkvWeight:
    """The query, key and value projections."""

    columns: int
    heads: QkvHeads
    norms: HeadNorms | None
    made: Any


@dataclass(frozen=True, slots=True)
class GateUpWeight:
    """The gate and up projections."""

    columns: int
    intermediate_size: int
    made: Any


@dataclass(frozen=True, slots=True)
class HeadsWeight:
    """One matrix [rows, columns] per head, stacked by rows."""

    num_heads: int
    rows: int
    columns: int
    made: Any


@dataclass(frozen=True, slots=True)
class ExpertsWeight:
    """The MLPs of a layer's experts, all of the same shape, with gates or without."""

    num_experts: int
    columns: int
    intermediate_size: int
    made: Any
    is_gated: bool = True
    is_partial: bool = False  # as in `LinearWeight`: has only some of each expert's inner columns


class Arithmetic(Protocol):
    """How a device computes products, and the weight layout that it needs for them."""

    def linear(self, source: WeightSource, bias: Floats | None, *, is_vocabulary: bool) -> Any:
        """Make `LinearWeight.made`."""

    def qkv(
        self,
        sources: Sequence[WeightSource],
        biases: Sequence[Floats] | None,
        heads: QkvHeads,
        norms: HeadNorms | None,
    ) -> Any:
        """Make `QkvWeight.made` from the sources of q, k and v."""

    def gate_up(self, sources: Sequence[WeightSource], biases: Sequence[Floats] | None) -> Any:
        """Make `GateUpWeight.made` from the sources of gate and up."""

    def router(self, source: WeightSource, bias: Floats | None) -> Any:
        """Make `LinearWeight.made` for a router: never quantised, as the choice of experts depends on it."""

    def heads(self, source: WeightSource, num_heads: int, *, is_transposed: bool) -> Any:
        """Make `HeadsWeight.made`, which is never quantised: it is small, and all heads depend on it."""

    def for_experts(self) -> Arithmetic:
        """Return the arithmetic whose `gate_up` and `linear` make what `experts` takes."""

    def for_states(self) -> Arithmetic:
        """Return the arithmetic whose `linear` keeps its input in floats, even if the weight has codes."""

    def experts(self, gate_ups: Sequence[Any], downs: Sequence[Any]) -> Any:
        """Make `ExpertsWeight.made` from the results of `for_experts`: gate and up, or up, and down."""


def vector(source: WeightSource) -> Floats:
    """Return a norm's weight or a bias as float32 [elements]: a copy, so that no file stays mapped."""
    return decode(source).reshape(-1).copy()


def linear_weight(
    source: WeightSource,
    arithmetic: Arithmetic,
    *,
    bias: WeightSource | None = None,
    is_vocabulary: bool = False,
    is_partial: bool = False,
) -> LinearWeight:
    """Make the weight of `linear`, `linear_add`, `head` and `embed` from a [rows, columns] source.

    `is_vocabulary` marks an embedding or a head. It is never quantised below eight bits, because its errors
    show in log-probabilities directly. `is_partial` marks one shard's columns of a matrix whose other columns
    belong to other shards; only one of the shards has the bias.

    Raises:
        ValueError: if the source is not a matrix, or the bias does not have one element per row.
    """
    rows, columns = _matrix("source", source)
    checked = None if bias is None else _bias(bias, source)
    made = arithmetic.linear(source, checked, is_vocabulary=is_vocabulary)
    return LinearWeight(rows, columns, made, is_partial)


def router_weight(
    source: WeightSource, arithmetic: Arithmetic, *, bias: WeightSource | None = None
) -> LinearWeight:
    """Make the weight of a `linear` whose rows are router logits; otherwise the same as `linear_weight`."""
    rows, columns = _matrix("source", source)
    checked = None if bias is None else _bias(bias, source)
    return LinearWeight(rows, columns, arithmetic.router(source, checked))


def heads_weight(
    source: WeightSource, arithmetic: Arithmetic, *, num_heads: int, is_transposed: bool = False
) -> HeadsWeight:
    """Make the weight of `heads_linear` from a source [num_heads * rows, columns].

    `is_transposed`: the source has the transpose of each head's matrix, [num_heads * columns, rows].

    Raises:
        ValueError: if each head's rows or the columns are not a multiple of 32, or the device has no such
            product.
    """
    rows, columns = _matrix("source", source)
    if rows % (num_heads * STRIP) or columns % STRIP:
        raise ValueError(
            f"`source` must have multiples of {STRIP} rows of each of {num_heads} heads, and of columns, got "
            f"[{rows}, {columns}]"
        )
    made = arithmetic.heads(source, num_heads, is_transposed=is_transposed)
    shape = (columns, rows // num_heads) if is_transposed else (rows // num_heads, columns)
    return HeadsWeight(num_heads, *shape, made)


def qkv_weight(
    sources: Sequence[WeightSource],
    arithmetic: Arithmetic,
    heads: QkvHeads,
    *,
    biases: Sequence[WeightSource] | None = None,
    norms: HeadNorms | None = None,
) -> QkvWeight:
    """Make the weight of `qkv` from the sources [heads * head_dim, columns] of queries, keys and values.

    Without keys (`QkvHeads.has_keys`), there is only the source of queries.

    Raises:
        ValueError: if a source's or bias's rows do not match the heads, or a norm has another size.
    """
    columns, names = sources[0].shape[-1], ("query", "key", "value")[: len(heads.counts)]
    for name, part, count in zip(names, sources, heads.counts, strict=True):
        if _matrix(name, part) != (count * heads.head_dim, columns):
            raise ValueError(f"`{name}` must be [{count} x {heads.head_dim}, {columns}], got {part.shape}")
    if norms is not None:
        norms.check(heads)
    made = arithmetic.qkv(sources, _biases(biases, sources), heads, norms)
    return QkvWeight(columns, heads, norms, made)


def gate_up_weight(
    gate: WeightSource,
    up: WeightSource,
    arithmetic: Arithmetic,
    *,
    biases: Sequence[WeightSource] | None = None,
) -> GateUpWeight:
    """Make the weight of `gate_up` from two [intermediate, columns] sources.

    Raises:
        ValueError: if the two differ in shape, or a bias does not fit.
    """
    rows, columns = _matrix("gate", gate)
    if up.shape != gate.shape:
        raise ValueError(f"`gate` and `up` must have one shape, got {gate.shape} and {up.shape}")
    return GateUpWeight(columns, rows, arithmetic.gate_up((gate, up), _biases(biases, (gate, up))))


def experts_weight(
    experts: Iterable[tuple[GateUpWeight | LinearWeight, LinearWeight]], arithmetic: Arithmetic, *,
    is_partial: bool = False,
) -> ExpertsWeight:  # fmt: skip
    """Make the weight of `experts_add` from each expert's gate-up, or up, and down weights (`for_experts`).

    `is_partial` marks one shard's part of each expert.

    Raises:
        ValueError: if there is no expert, the experts' shapes differ, only some have gates, or the device
            does not support them.
    """
    made = list(experts)
    if not made:
        raise ValueError("a layer must have an expert")
    is_gated, columns, inner = shape = _shape_of(made[0][0])
    for first, down in made:
        if (_shape_of(first), down.rows, down.columns) != (shape, columns, inner):
            raise ValueError(
                f"the experts of a layer must be of {columns} columns and {inner} inner ones, with gates or "
                f"without, got {_shape_of(first)} and [{down.rows}, {down.columns}]"
            )
    products = arithmetic.experts([first.made for first, _ in made], [down.made for _, down in made])
    return ExpertsWeight(len(made), columns, inner, products, is_gated, is_partial)


def _shape_of(first: GateUpWeight | LinearWeight) -> tuple[bool, int, int]:
    """Return whether the first half of an MLP has gates, its columns, and its inner ones."""
    if isinstance(first, LinearWeight):
        return False, first.columns, first.rows
    return True, first.columns, first.intermediate_size


def _matrix(name: str, source: WeightSource) -> tuple[int, int]:
    if len(source.shape) != 2:
        raise ValueError(f"`{name}` must be a matrix, got the shape {source.shape}")
    return source.shape[0], source.shape[1]


def _bias(bias: WeightSource, source: WeightSource) -> Floats:
    found = vector(bias)
    if found.shape != (source.shape[0],):
        raise ValueError(f"a bias must have {source.shape[0]} elements, got {found.shape}")
    return found


def _biases(biases: Sequence[WeightSource] | None, sources: Sequence[WeightSource]) -> list[Floats] | None:
    if biases is None:
        return None
    return [_bias(bias, source) for bias, source in zip(biases, sources, strict=True)]
