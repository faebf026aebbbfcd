"""Weights in the layout of the CPU kernels: packed once from the file's own bytes, never held twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tgi_asgi import _C
from tgi_asgi.ops import layout
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.column_order import ColumnOrder, Form, OrderedForm
from tgi_asgi.ops.formats import FORMATS
from tgi_asgi.ops.layout import Order
from tgi_asgi.ops.norm_weight import HeadNorms, NormWeight
from tgi_asgi.ops.qkv_heads import QkvHeads
from tgi_asgi.ops.sources import WORDS, WeightSource, decode, from_floats, rounded

# Precision that depends on the token: int8 for generated tokens, bfloat16 for prompt tokens.
BY_KIND = "by_kind"


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A matrix in panels, and how it is multiplied."""

    matrix: _C.Matrix
    precision: str  # of the activation: int8, bfloat16 or float32, or `BY_KIND`
    bias: Floats | None  # in the order of the packed rows
    order: ColumnOrder | None = None  # of the packed columns; None: the input's

    @property
    def form(self) -> Form:
        """The form of the input."""
        return self.precision if self.order is None else OrderedForm(self.precision, self.order)


@dataclass(frozen=True, slots=True)
class PackedQkv:
    """Queries, keys and values: one matrix, or three if their formats or orders of columns differ.

    Norms are in packed order.
    """

    parts: tuple[PackedLinear, ...]
    norms: _C.HeadNorms | None


@dataclass(frozen=True, slots=True)
class PackedGateUp:
    """Gate and up: one matrix whose panels alternate, or two if their formats or orders of columns differ."""

    parts: tuple[PackedLinear, ...]


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The products of all experts, and the precisions in which they are multiplied."""

    gate_up: tuple[_C.ExpertStack, ...]  # one per part of `PackedGateUp`, or that of ups alone
    down: _C.ExpertStack
    precision: str  # of the input
    inner_precision: str  # of the input of `down`


@dataclass(frozen=True, slots=True)
class _Shares:
    """How a product divides a matrix's strips between the team's members: csrc/cpu/step/shares.h."""

    unit_strips: int = 1
    query_strips: int = 0
    all_strips: int = 0


_ALONE = _Shares()


def _qkv_shares(heads: QkvHeads, norms: HeadNorms | None) -> _Shares:
    """Return how `qkv` divides its rows between threads: by heads if these are normalised, else by strips."""
    if norms is not None and norms.is_whole:  # computed as separate products first
        return _ALONE
    strips = -(-heads.head_dim // layout.STRIP)
    return _Shares(1 if norms is None else strips, heads.num_heads * strips, sum(heads.counts) * strips)


def _head_norm(norm: NormWeight, order: Order, head_dim: int) -> _C.Norm:
    """Return a norm of all heads, or of each head, in packed order."""
    if norm.columns == head_dim:
        order = order[: layout.round_up(head_dim)]
    weight, bias = (
        None if part is None else layout.ordered(part, order) for part in (norm.weight, norm.bias)
    )
    assert weight is not None
    return _C.Norm(weight=weight, bias=bias, width=head_dim, eps=norm.eps)


ROUNDED = ("F32", "F16")  # the formats that `Packing.rounds_floats` concerns


@dataclass(frozen=True, slots=True)
class Packing:
    """How a CPU computes a model's products: an `Arithmetic`.

    `is_exact` keeps activations in float32. Otherwise quantised weights are multiplied by 8-bit activations
    in blocks of 32, and bfloat16 weights by bfloat16 activations. float16 and float32 weights are multiplied
    by float32 activations in both modes; with `rounds_floats`, they become bfloat16 instead. With
    `has_float_prompts`, quantised weights are decoded to bfloat16 and multiplied in bfloat16 for prompt
    tokens. This excludes the vocabulary's weights, whose products have few tokens.

    A weight whose columns have an order of their own (GPTQ's act-order) keeps it, and its product reads its
    input in that order. The vocabulary's weights, routers, heads' and experts' matrices are decoded instead:
    their rows are embeddings, they are small, or several of them read one input.

    Attributes:
        keeps_orders: Whether weights may keep an order of columns.
        keeps_inputs: Whether the inputs of quantised weights stay in float32.
        by_kind: Bytes, by format, of the weights that prompt tokens multiply in another precision than
            generated tokens.
        num_bytes: Bytes, by format, of all packed weights but the vocabulary's.
    """

    is_exact: bool
    quantise: str | None = None  # Q8_0 or Q4_0: format for float weights; a vocabulary stays at eight bits
    rounds_floats: bool = False
    has_float_prompts: bool = field(default=False, repr=False)
    keeps_orders: bool = field(default=True, repr=False)
    keeps_inputs: bool = field(default=False, repr=False)
    by_kind: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    num_bytes: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    arena: _C.Arena = field(default_factory=_C.Arena, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how it computes, for another shard, without what it has packed."""
        return Packing, (self.is_exact, self.quantise, self.rounds_floats, self.has_float_prompts)

    def linear(self, source: WeightSource, bias: Floats | None, *, is_vocabulary: bool) -> PackedLinear:
        """Pack a matrix; see `Arithmetic.linear`."""
        order = layout.row_order(source.shape[0])
        stored = self._stored(source, is_vocabulary=is_vocabulary)
        return self._pack([stored], bias, order, is_vocabulary=is_vocabulary)

    def qkv(
        self,
        sources: Sequence[WeightSource],
        biases: Sequence[Floats] | None,
        heads: QkvHeads,
        norms: HeadNorms | None,
    ) -> PackedQkv:
        """Pack q, k and v; see `Arithmetic.qkv`."""
        orders, packed = layout.qkv_orders(heads), None
        if norms is not None:
            packed = _C.HeadNorms(
                query=_head_norm(norms.query, orders[0], heads.head_dim),
                key=_head_norm(norms.key, orders[1 if heads.has_keys else 0], heads.head_dim),
                is_whole=norms.is_whole, is_last=norms.is_last, has_values=norms.has_values,
            )  # fmt: skip
        return PackedQkv(self._pack_parts(sources, biases, orders, _qkv_shares(heads, norms)), packed)

    def gate_up(self, sources: Sequence[WeightSource], biases: Sequence[Floats] | None) -> PackedGateUp:
        """Pack gate and up; see `Arithmetic.gate_up`."""
        stored = [self._stored(source) for source in sources]
        rows = sources[0].shape[0]
        if not _are_alike(stored):
            order = layout.row_order(rows)
            return PackedGateUp(self._pack_each(stored, biases, [order, order]))
        bias = None if biases is None else np.concatenate(biases)
        return PackedGateUp((self._pack(stored, bias, layout.interleaved_order(rows), _Shares(2)),))

    def router(self, source: WeightSource, bias: Floats | None) -> PackedLinear:
        """Pack a matrix without quantising or rounding it; see `Arithmetic.router`."""
        plain = replace(self, quantise=None, rounds_floats=False, keeps_orders=False)
        return plain.linear(source, bias, is_vocabulary=False)

    def for_experts(self) -> Packing:
        """Return how experts' matrices are packed: with the columns of the one input that all read."""
        return replace(self, keeps_orders=False)

    def for_states(self) -> Packing:
        """Return how matrices are packed whose inputs must not be rounded; see `Arithmetic.for_states`."""
        return replace(self, keeps_inputs=True)

    def heads(self, source: WeightSource, num_heads: int, *, is_transposed: bool) -> PackedLinear:
        """Pack the heads' matrices, stacked by rows; see `Arithmetic.heads`."""
        if is_transposed:
            source = self._transposed(source.in_order(), num_heads)
        return self.router(source, None)

    def experts(
        self, gate_ups: Sequence[PackedGateUp | PackedLinear], downs: Sequence[PackedLinear]
    ) -> PackedExperts:
        """Group the experts' packed matrices; see `Arithmetic.experts`.

        Raises:
            ValueError: if gate and up share one format in some experts and not in others.
        """
        parts = [each.parts if isinstance(each, PackedGateUp) else (each,) for each in gate_ups]
        counts = {len(each) for each in parts}
        if len(counts) > 1:
            raise ValueError("gate and up must be of one format in all experts of a layer, or in none")
        gates = [stacked([each[part] for each in parts]) for part in range(counts.pop())]
        down, inner_precision = stacked(downs)
        precision = _common(found for _, found in gates)
        return PackedExperts(tuple(stack for stack, _ in gates), down, precision, inner_precision)

    def _pack_parts(
        self,
        sources: Sequence[WeightSource],
        biases: Sequence[Floats] | None,
        orders: Sequence[Order],
        shares: _Shares,
    ) -> tuple[PackedLinear, ...]:
        """Pack matrices, each with its own row order, into one if they are alike."""
        stored = [self._stored(source) for source in sources]
        if not _are_alike(stored):
            return self._pack_each(stored, biases, orders, shares)
        first, joined = 0, []
        for source, order in zip(stored, orders, strict=True):
            joined.append(np.where(order >= 0, order + first, -1))
            first += source.shape[0]
        bias = None if biases is None else np.concatenate(biases)
        return (self._pack(stored, bias, np.concatenate(joined), shares),)

    def _pack_each(
        self,
        sources: Sequence[WeightSource],
        biases: Sequence[Floats] | None,
        orders: Sequence[Order],
        shares: _Shares = _ALONE,
    ) -> tuple[PackedLinear, ...]:
        given: Sequence[Floats | None] = biases or [None] * len(sources)
        packed, strips = [], 0
        for source, bias, order in zip(sources, given, orders, strict=True):
            packed.append(self._pack([source], bias, order, shares, strips if shares.all_strips else 0))
            strips += len(order) // layout.STRIP
        return tuple(packed)

    def _pack(
        self,
        sources: Sequence[WeightSource],
        bias: Floats | None,
        order: Order,
        shares: _Shares = _ALONE,
        first_strip: int = 0,
        *,
        is_vocabulary: bool = False,
    ) -> PackedLinear:
        """Pack rows of sources that are alike: row i of the result is row order[i] of the sources."""
        name, columns = sources[0].format, sources[0].shape[1]
        if any(source.shape[1] != columns for source in sources):
            raise ValueError(f"the matrices must have {columns} columns each")
        matrix = _C.pack(
            sources=[source.data for source in sources], format=name, columns=columns, order=order,
            arena=self.arena, unit_strips=shares.unit_strips, query_strips=shares.query_strips,
            all_strips=shares.all_strips, first_strip=first_strip,
        )  # fmt: skip
        precision = self._precision(name, is_vocabulary)
        if precision == BY_KIND:
            self.by_kind[name] += matrix.nbytes
        if not is_vocabulary:
            self.num_bytes[name] += matrix.nbytes
        packed_bias = None if bias is None else layout.ordered(bias, order)
        return PackedLinear(matrix, precision, packed_bias, _order_of(sources[0]))

    def _precision(self, name: str, is_vocabulary: bool) -> str:
        if self.is_exact:
            return "float32"
        if FORMATS[name].is_quantised and self.keeps_inputs:
            return "float32"
        if FORMATS[name].is_quantised:
            return BY_KIND if self.has_float_prompts and not is_vocabulary else "int8"
        return "bfloat16" if name == "BF16" else "float32"

    def _transposed(self, source: WeightSource, num_heads: int) -> WeightSource:
        """Transpose each head's matrix. Codes, whose blocks run along rows, become floats, as FP8 does."""
        if source.format not in WORDS:
            is_rounded = FORMATS[source.format].is_quantised and not self.is_exact
            source = rounded(source) if is_rounded else from_floats(decode(source))
        return source.transposed(num_heads)

    def _stored(self, source: WeightSource, *, is_vocabulary: bool = False) -> WeightSource:
        """Return a matrix as it will be packed: the file's own bytes, unless quantised or decoded here."""
        if is_vocabulary or not self.keeps_orders or not FORMATS[source.format].is_quantised:
            source = source.in_order()
        info = FORMATS[source.format]
        if info.has_kernel and not source.is_decoded and (info.is_quantised or self.quantise is None):
            rounds = self.rounds_floats and source.format in ROUNDED
            return rounded(source) if rounds else source
        if self.quantise is None:
            # FP8: rounded to bfloat16, which has more bits
            return from_floats(decode(source)) if self.is_exact else rounded(source)
        name = "Q8_0" if is_vocabulary else self.quantise
        rows, columns = source.shape
        blocks = _C.quantise(source.data.reshape(-1), source.format, columns, name)
        return WeightSource(blocks, name, (rows, layout.round_up(columns)))


def _are_alike(sources: Sequence[WeightSource]) -> bool:
    """Return whether matrices of one input can be one matrix: they share a format and an order of columns."""
    return len({(source.format, _order_of(source)) for source in sources}) == 1


def _order_of(source: WeightSource) -> ColumnOrder | None:
    return None if source.order is None else ColumnOrder.of(source.order)


def stacked(parts: Sequence[PackedLinear]) -> tuple[_C.ExpertStack, str]:
    """Group one product of several experts; return the stack and the precision in which it is computed.

    Raises:
        ValueError: if a matrix has an order of columns: it was not packed with `Packing.for_experts`.
    """
    if any(part.order is not None for part in parts):
        raise ValueError("experts read one input, so their matrices must have its order of columns")
    biases = [part.bias for part in parts if part.bias is not None]
    stack = _C.ExpertStack([part.matrix for part in parts], biases or None)
    return stack, _common(part.precision for part in parts)


def _common(precisions: Iterable[str]) -> str:
    """Return the common precision, or float32, which every product supports, if they differ."""
    found = set(precisions)
    return found.pop() if len(found) == 1 else "float32"
