"""LoRA adapters on a CUDA device: a pool of slots, each with the matrices of one adapter.

    layout = CudaAdapterLayout({"layers.0.mlp.down_proj": Target(weight, 0, 2048)}, 16,
                               num_slots=8, dtype=torch.bfloat16, device=device)
    adapter = layout.pack({"layers.0.mlp.down_proj": Delta(down, up, scale)})    # in the host's memory
    program = CudaProgram(recorder, adapters=layout, ...)
    [slot] = layout.place([adapter])                                             # copied if it is not there

The host keeps as many adapters as it may, the device those of the steps in flight and the last ones before.
An adapter's matrices lie one after another, so placing it is one copy. Kernels: csrc/cuda/lora.cu.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi.ops.adapters import AdaptableWeight, Delta, Target, changes_by_weight
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.cuda_list import Condition, Input, LaunchList, Size, tokens_of
from tgi_asgi.ops.cuda_quant import joined_halves
from tgi_asgi.ops.cuda_scratch import Scratch
from tgi_asgi.ops.layout import round_up
from tgi_asgi.ops.weights import GateUpWeight, QkvWeight

_ALIGNMENT = 8  # elements that a kernel loads at a time


@dataclass(frozen=True, slots=True)
class CudaProduct:
    """A product that adapters may change.

    Attributes:
        index: Its row in an adapter's places.
        ends: The last row of each piece, plus one: of q, k and v, or of gate and up.
        max_rank: Maximum rank of a piece, in whole vectors.
    """

    index: int
    ends: tuple[int, ...]
    columns: int
    max_rank: int

    @property
    def rows(self) -> int:
        return self.ends[-1]

    @property
    def num_inner(self) -> int:
        return len(self.ends) * self.max_rank

    def num_elements(self, rank: int) -> int:
        """Return the size of an adapter's matrices for this product."""
        return rank * (len(self.ends) * self.columns + self.rows)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class CudaAdapter:
    """An adapter in the host's memory, as a slot of the device's pool has it."""

    values: Tensor  # the matrices `down` [pieces * rank, columns] and `up` [rows, rank] of each product
    places: Tensor  # [num_products, 2] int32: its rank (0: no change), and where it begins, in 8 elements
    number: int = 0  # what other shards call it

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes


class CudaAdapterLayout:
    """The targets of a model by name, and the pool of adapters on the device.

    Args:
        targets: The targets that adapters may name.
        max_rank: Maximum rank of a target's `down`.
        num_slots: Number of adapters on the device: at least the number that a step may have.
        dtype: Dtype of the model's activations, in which the matrices are stored.

    Attributes:
        pool: [num_slots, slot_elements]; a slot has space for `max_rank` on all products.
        places: [num_slots, num_products, 2] int32, those of each slot's adapter.
    """

    rank_factor = 1  # as in `AdapterLayout`

    def __init__(
        self, targets: Mapping[str, Target], max_rank: int, *, num_slots: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.targets, self.max_rank = dict(targets), max_rank
        self._products: dict[int, CudaProduct] = {}  # by the weight's id
        rank = round_up(max_rank, _ALIGNMENT)
        for target in self.targets.values():
            weight = target.weight
            if id(weight) not in self._products:
                index = len(self._products)
                self._products[id(weight)] = CudaProduct(index, _ends_of(weight), weight.columns, rank)
        size = sum(product.num_elements(rank) for product in self._products.values())
        self.pool = torch.zeros(num_slots, size, dtype=dtype, device=device)
        self.places = torch.zeros(num_slots, len(self._products), 2, dtype=torch.int32, device=device)
        self._residents: list[weakref.ref[CudaAdapter] | None] = [None] * num_slots
        self._last_used = [0] * num_slots  # number of the last `place` that used each slot
        self._num_placed = 0

    def product(self, weight: AdaptableWeight) -> CudaProduct | None:
        """Return a product; None if no adapter can change it."""
        return self._products.get(id(weight))

    def launch(
        self, launches: LaunchList, scratch: Scratch, weight: AdaptableWeight, a: Tensor, out: Tensor,
        factor: float,
    ) -> None:  # fmt: skip
        """Append what adapters add to a product of their tokens; steps without adapters skip it.

        Args:
            a: Input of the product, [max_tokens, columns].
            out: Its result [max_tokens, rows], to which `factor` times theirs is added.
        """
        product = self.product(weight)
        if product is None:
            return
        when = Condition(Size.ADAPTED, 1)
        inner = tokens_of(scratch.buffer("adapters", (a.shape[0], product.num_inner), torch.float32))
        adapters = (Input.ADAPTERS, self.places, self.pool, product.index, product.max_rank)
        launches.add("tgi_cuda::lora_down", tokens_of(a), *adapters, inner, when=when)
        first_end, second_end, *_ = (*product.ends, product.rows)
        launches.add(
            "tgi_cuda::lora_up", inner, *adapters, product.columns, first_end, second_end, factor,
            tokens_of(out), when=when,
        )  # fmt: skip

    def pack(self, deltas: Mapping[str, Delta], number: int = 0) -> CudaAdapter:
        """Return an adapter that adds these deltas to their targets.

        The scale is multiplied into `up` before it is rounded to the pool's dtype.

        Raises:
            ValueError: as `AdapterLayout.pack`, or if a value is too large for the dtype.
        """
        changes = changes_by_weight(self.targets, deltas, self.max_rank)
        ranks = [round_up(max(delta.down.shape[0] for _, _, delta in group), _ALIGNMENT) for group in changes]
        products = [self._products[id(group[0][1].weight)] for group in changes]
        sizes = [product.num_elements(rank) for product, rank in zip(products, ranks, strict=True)]
        values = torch.zeros(sum(sizes), dtype=self.pool.dtype)
        places, begin = torch.zeros(len(self._products), 2, dtype=torch.int32), 0
        for group, product, rank, part in zip(changes, products, ranks, values.split(sizes), strict=True):
            places[product.index] = torch.tensor([rank, begin // _ALIGNMENT])
            _fill(part, product, rank, group)
            begin += part.numel()
        return CudaAdapter(values, places, number)

    def place(
        self, adapters: Sequence[CudaAdapter], copy: Callable[[int, CudaAdapter], None] | None = None
    ) -> list[int]:
        """Return the slot of each of a step's different adapters, after beginning to copy those not there.

        Takes the slots that have not been used for the longest time.

        Args:
            copy: Begins to copy an adapter to a slot; by default the method of that name.

        Raises:
            ValueError: if there are more than slots.
        """
        if len(adapters) > len(self._residents):
            raise ValueError(f"a step has {len(adapters)} adapters, the device {len(self._residents)} slots")
        self._num_placed += 1
        residents = {None if ref is None else ref(): slot for slot, ref in enumerate(self._residents)}
        for adapter in adapters:
            if adapter in residents:
                self._last_used[residents[adapter]] = self._num_placed
        slots = []
        for adapter in adapters:
            slot = residents.get(adapter)
            if slot is None:
                slot = min(range(len(self._residents)), key=self._last_used.__getitem__)
                self._residents[slot] = None  # the copy may fail halfway
                (copy or self.copy)(slot, adapter)
                self._residents[slot], self._last_used[slot] = weakref.ref(adapter), self._num_placed
            slots.append(slot)
        return slots

    def copy(self, slot: int, adapter: CudaAdapter) -> None:
        """Begin to copy an adapter to a slot.

        The copy is made on the current stream, so steps launched before still read the slot's former adapter.
        """
        self.pool[slot, : adapter.values.numel()].copy_(adapter.values, non_blocking=True)
        self.places[slot].copy_(adapter.places, non_blocking=True)


def _fill(
    values: Tensor, product: CudaProduct, rank: int, changes: Sequence[tuple[str, Target, Delta]]
) -> None:
    """Write the matrices of a product's part of an adapter; rows of pieces that do not change stay 0."""
    num_down = len(product.ends) * rank * product.columns
    downs = values[:num_down].view(len(product.ends), rank, product.columns)
    ups = values[num_down:].view(product.rows, rank)
    starts = (0, *product.ends[:-1])
    changed = set[int]()
    for name, target, delta in changes:
        own_rank = delta.down.shape[0]
        for piece, (start, stop) in enumerate(zip(starts, product.ends, strict=True)):
            if not target.start <= start < stop <= target.stop:
                continue
            if piece in changed:
                raise ValueError(f"{name} has rows that another target of the adapter has, too")
            changed.add(piece)
            up = delta.scale * delta.up[start - target.start : stop - target.start]
            downs[piece, :own_rank] = torch.from_numpy(delta.down.copy())  # a file's array is read-only
            ups[start:stop, :own_rank] = torch.from_numpy(_in_device_order(target.weight, piece, up))
        if not values.isfinite().all():
            raise ValueError(f"{name} has a value that is too large for {values.dtype}")


def _ends_of(weight: AdaptableWeight) -> tuple[int, ...]:
    """Return the last row, plus one, of each matrix that is stacked in a weight."""
    if isinstance(weight, GateUpWeight):
        return weight.intermediate_size, 2 * weight.intermediate_size
    if isinstance(weight, QkvWeight):
        return tuple(itertools.accumulate(weight.heads.rows))
    return (weight.rows,)


def _in_device_order(weight: AdaptableWeight, piece: int, up: Floats) -> Floats:
    """Return a piece's rows in the order of the device's matrix, as `Repacking.qkv` stacks it."""
    if not isinstance(weight, QkvWeight) or not weight.heads.is_interleaved or piece == 2:
        return up
    return up[joined_halves(weight.heads, weight.heads.counts[piece])]
