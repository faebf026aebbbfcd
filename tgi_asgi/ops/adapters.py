"""LoRA adapters on packed weights: which of a model's products they may change, and by what.

    layout = AdapterLayout({"layers.0.mlp.down_proj": Target(weight, 0, 2048)}, max_rank=16)
    adapter = layout.pack({"layers.0.mlp.down_proj": Delta(down, up, scale)})
    CpuProgram(recorder, adapters=layout, ...)      # whose rows may then use this adapter

Several targets may be packed as one product: q, k and v, or gate and up. Their `down` matrices are then
stacked by rows, and each panel of the product's rows records which inner values belong to it. Source: Hu et
al., LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.ops import layout
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.layout import Order
from tgi_asgi.ops.packing import PackedGateUp, PackedLinear, PackedQkv
from tgi_asgi.ops.weights import GateUpWeight, LinearWeight, QkvWeight

AdaptableWeight = LinearWeight | QkvWeight | GateUpWeight
NativeAdapter = _C.Adapter
_Bits = npt.NDArray[np.uint16]
_Indices = npt.NDArray[np.int64]
_Packed = tuple[_Bits, Floats, _Indices, _Bits]  # down, scales, panels and up, as in `_C.Adapter`


@dataclass(frozen=True, slots=True)
class Target:
    """Rows [start, stop) of a weight, whose matrices are stacked by rows: q, k and v, or gate and up.

    Attributes:
        order: For each of these rows, its row in an adapter's `up`; None: the same order.
        others: Where the other rows of the adapter's matrix are, if two products share it.
        columns: The weight's columns in the adapter's `down`; None: all of them.
        uncut: Shape of the matrix that the adapter changes, if the weight has only part of it.
    """

    weight: AdaptableWeight
    start: int
    stop: int
    order: Order | None = None
    others: tuple[Target, ...] = ()
    columns: range | None = None
    uncut: tuple[int, int] | None = None

    @classmethod
    def whole(cls, weight: LinearWeight) -> Target:
        """Return all rows of a weight."""
        return cls(weight, 0, weight.rows)

    @property
    def parts(self) -> tuple[Target, ...]:
        """This target, and those that share its matrix."""
        return self, *self.others

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that an adapter changes, whose rows the weight may have more than once."""
        if self.uncut is not None:
            return self.uncut
        rows = (
            part.stop - part.start if part.order is None else int(part.order.max()) + 1 for part in self.parts
        )
        return max(rows), self.weight.columns


@dataclass(frozen=True, slots=True)
class Delta:
    """The change to a target's matrix: scale * up @ down."""

    down: Floats  # [rank, columns]
    up: Floats  # [rows, rank]
    scale: float


@dataclass(frozen=True, slots=True)
class _Product:
    """A packed matrix, and the row of its weight for each of its own rows (-1: padding)."""

    packed: PackedLinear
    order: Order

    @property
    def columns(self) -> int:
        """Columns of the packed matrix, in whole blocks."""
        return layout.round_up(self.packed.matrix.num_columns)


class AdapterLayout:
    """The targets of a model by name, and the adapter capacity of a program's products.

    Args:
        targets: The targets that adapters may name.
        max_rank: Maximum rank of a target's `down`.
        is_exact: Whether adapters keep float32's precision, or are rounded to bfloat16.

    Attributes:
        native: The extension's layout.
        rank_factor: How many times its rank an adapter may take once it is packed.
    """

    def __init__(self, targets: Mapping[str, Target], max_rank: int, *, is_exact: bool = False) -> None:
        self.targets, self.max_rank = dict(targets), max_rank
        self.rank_factor = 3 if is_exact else 1  # see `_in_parts`
        self._products: list[_Product] = []
        self._of_weight: dict[int, range] = {}  # products of each weight, by the weight's id
        sizes: list[tuple[int, int, int]] = []
        for target in (part for each in self.targets.values() for part in each.parts):
            if id(target.weight) in self._of_weight:
                continue
            products = _products_of(target.weight)
            first = len(self._products)
            self._of_weight[id(target.weight)] = range(first, first + len(products))
            self._products += products
            for each in products:
                # A product has up to three targets (q, k and v), each with as many inner values as its rank.
                num_inner = 3 * max_rank * self.rank_factor
                sizes.append((each.columns, each.packed.matrix.num_stored_rows, num_inner))
        self._by_packed = {id(each.packed): index for index, each in enumerate(self._products)}
        self.native = _C.AdapterLayout(sizes)

    def product(self, packed: PackedLinear) -> int | None:
        """Return the index of a product; None if no adapter can change it."""
        return self._by_packed.get(id(packed))

    def pack(self, deltas: Mapping[str, Delta], number: int = 0) -> NativeAdapter:
        """Return an adapter that adds these deltas to their targets.

        Args:
            number: What steps call it when they are sent to other shards.

        Raises:
            ValueError: if a name is not a target, a shape differs from its target's, a rank exceeds
                `max_rank`, a value is not finite, or two targets cover the same rows.
        """
        parts: list[tuple[int, _Bits, Floats, _Indices, _Bits]] = []
        for changes in changes_by_weight(self.targets, deltas, self.max_rank):
            if self.rank_factor > 1:
                changes = [(name, target, _in_parts(delta)) for name, target, delta in changes]
            for index in self._of_weight[id(changes[0][1].weight)]:
                packed = _pack(self._products[index], changes)
                if packed is not None:
                    parts.append((index, *packed))
        return _C.Adapter(self.native, parts, number)


def changes_by_weight(
    targets: Mapping[str, Target], deltas: Mapping[str, Delta], max_rank: int
) -> list[list[tuple[str, Target, Delta]]]:
    """Return the deltas that change each weight, with their targets and in the rows' order of the weight.

    Raises:
        ValueError: if a name is not a target, a shape differs from its target's, a rank exceeds `max_rank`,
            or a value is not finite in bfloat16.
    """
    found: dict[int, list[tuple[str, Target, Delta]]] = {}
    for name, delta in deltas.items():
        target = targets.get(name)
        if target is None:
            raise ValueError(f"{name} is not a product that adapters can change")
        _check(name, target, delta, max_rank)
        for part in target.parts:
            mine = delta if part.order is None else replace(delta, up=delta.up[part.order])
            if part.columns is not None:
                mine = replace(mine, down=mine.down[:, part.columns.start : part.columns.stop])
            found.setdefault(id(part.weight), []).append((name, part, mine))
    return list(found.values())


def _check(name: str, target: Target, delta: Delta, max_rank: int) -> None:
    rows, columns = target.shape
    rank = delta.down.shape[0]
    if delta.down.shape != (rank, columns) or delta.up.shape != (rows, rank):
        raise ValueError(
            f"{name} is [{rows}, {columns}], the adapter's matrices are {list(delta.down.shape)} and "
            f"{list(delta.up.shape)}"
        )
    if not 1 <= rank <= max_rank:
        raise ValueError(f"{name} has the rank {rank}, allowed are 1 to {max_rank}")
    if not all(np.isfinite(_rounded(matrix)).all() for matrix in (delta.down, delta.up)):
        raise ValueError(f"{name} has a value that is not finite")


def _products_of(weight: AdaptableWeight) -> list[_Product]:
    """Return a weight's packed matrices, with the row order that `Packing` has chosen."""
    made = weight.made
    if isinstance(weight, LinearWeight):
        return [_Product(made, layout.row_order(weight.rows))]
    if isinstance(weight, GateUpWeight):
        assert isinstance(made, PackedGateUp)
        rows = weight.intermediate_size
        if len(made.parts) == 1:
            return [_Product(made.parts[0], layout.interleaved_order(rows))]
        return _shifted(made.parts, [layout.row_order(rows)] * 2, [rows] * 2)
    assert isinstance(made, PackedQkv)
    orders, rows_each = layout.qkv_orders(weight.heads), weight.heads.rows
    if len(made.parts) == len(orders):
        return _shifted(made.parts, orders, rows_each)
    joined = [each.order for each in _shifted([made.parts[0]] * len(orders), orders, rows_each)]
    return [_Product(made.parts[0], np.concatenate(joined))]


def _shifted(parts: Sequence[PackedLinear], orders: Sequence[Order], counts: Sequence[int]) -> list[_Product]:
    starts = np.cumsum([0, *counts[:-1]])
    return [
        _Product(part, np.where(order >= 0, order + start, -1))
        for part, order, start in zip(parts, orders, starts, strict=True)
    ]


def _pack(product: _Product, changes: list[tuple[str, Target, Delta]]) -> _Packed | None:
    """Return the extension's arguments for one product of an adapter; None if nothing changes the product."""
    panels = product.order.reshape(-1, layout.PANEL)
    inner = np.zeros((len(panels), 2), np.int64)  # per panel: its first inner value, and how many it has
    starts = np.zeros(len(panels), np.int64)  # where a panel's rows are in `ups`
    downs: list[_Bits] = []
    ups: list[_Bits] = []
    scales: list[float] = []
    num_up = 0
    for name, target, delta in changes:
        mine = np.flatnonzero(((panels >= target.start) & (panels < target.stop)).any(axis=1))
        if not len(mine):
            continue
        if inner[mine, 1].any():
            raise ValueError(f"{name} has rows that another target of the adapter has, too")
        rank = delta.down.shape[0]
        starts[mine] = num_up + np.arange(len(mine)) * rank
        inner[mine] = len(scales), rank
        scales += [delta.scale] * rank
        downs.append(_down(product, delta))
        rows = np.where(panels[mine] >= 0, panels[mine] - target.start, target.stop - target.start)
        padded = np.pad(_bits(delta.up), ((0, 1), (0, 0)))  # the last row stands for padding
        ups.append(padded[rows].swapaxes(1, 2).reshape(-1, layout.PANEL))  # [panels * rank, 16]
        num_up += len(mine) * rank
    if not scales:
        return None
    counts = inner[:, 1]
    in_order = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(num_up)
    up = np.concatenate(ups)[in_order]  # panel by panel, as the product reads it
    return np.concatenate(downs), np.array(scales, np.float32), inner, up


def _down(product: _Product, delta: Delta) -> _Bits:
    """Return a delta's `down` with its columns as in the product's input: in the same order, and padded."""
    order, columns = product.packed.order, delta.down.shape[1]
    down = delta.down if order is None else delta.down[:, order.indices]
    return np.pad(_bits(down), ((0, 0), (0, product.columns - columns)))


def _in_parts(delta: Delta) -> Delta:
    """Return a delta in bfloat16 of up to three times the rank, with nearly float32's precision.

        up @ down = u @ d + u @ d' + u' @ d + u' @ d'

    u and d are rounded to bfloat16, and u' and d' are what that takes away. The last term, at most 2^-18 of
    the product, is left out, as are terms of zeros: a delta in bfloat16 keeps its rank.
    """
    up, down = _rounded(delta.up), _rounded(delta.down)
    up_rest, down_rest = delta.up - up, delta.down - down
    pairs = [(up, down)]
    if down_rest.any():
        pairs.append((up, down_rest))
    if up_rest.any():
        pairs.append((up_rest, down))
    ups, downs = zip(*pairs, strict=True)
    return replace(delta, up=np.concatenate(ups, 1), down=np.concatenate(downs))


def _bits(matrix: Floats) -> _Bits:
    """Return a matrix in bfloat16."""
    return _C.bfloat16_bits(np.ascontiguousarray(matrix))


def _rounded(matrix: Floats) -> Floats:
    """Return a matrix rounded to bfloat16, in float32."""
    return (_bits(matrix).astype(np.uint32) << 16).view(np.float32)
