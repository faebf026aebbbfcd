"""LoRA adapters on a CUDA device: a pool of slots, each with the matrices of one adapter.

    layout = CudaAdapterLayout({"layers.0.mlp.down_proj": Target(weight, 0, 2048)}, 16,
                               num_slots=8, dtype=torch.bfloat16, device=device)
    adapter = layout.pack({"layers.0.mlp.down_proj": Delta(down, up, scale)})    # in the host's memory
    program = CudaProgram(recorder, adapters=layout, ...)
    [slot] = layout.place([adapter])                                             # copied if it is not there

The host keeps as many adapters as it may, the device those of the steps in flight and the last ones before.
All matrices of a slot lie in one row of the pool, so placing an adapter is one copy. Kernels and sources:
csrc/cuda/lora.cu.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi.ops.adapters import AdaptableWeight, Delta, Target, changes_by_weight
from tgi_asgi.ops.cuda_quant import joined_halves
from tgi_asgi.ops.weights import GateUpWeight, QkvWeight

_ALIGNMENT = 8  # elements that a kernel loads at a time


@dataclass(frozen=True, slots=True)
class CudaProduct:
    """Where a product's matrices lie in a slot, and which rows have inner values of their own.

    Attributes:
        ends: The last row of each piece, plus one: of q, k and v, or of gate and up.
        down: Offset of `down` [num_inner, columns] in elements.
        up: Offset of `up` [rows, rank].
    """

    ends: tuple[int, ...]
    columns: int
    rank: int
    down: int

    @property
    def num_inner(self) -> int:
        return len(self.ends) * self.rank

    @property
    def rows(self) -> int:
        return self.ends[-1]

    @property
    def up(self) -> int:
        return self.down + self.num_inner * self.columns

    @property
    def end(self) -> int:
        """Offset of the next product."""
        return self.up + self.rows * self.rank


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class CudaAdapter:
    """An adapter in the host's memory, laid out as a slot of the device's pool."""

    values: Tensor  # [slot_elements], pinned if the device is a GPU
    rank: int  # largest of its matrices, rounded up to what kernels load at a time

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
        pool: [num_slots, slot_elements].
        ranks: [num_slots] int32, the rank of each slot's adapter.
    """

    def __init__(
        self, targets: Mapping[str, Target], max_rank: int, *, num_slots: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.targets, self.max_rank = dict(targets), max_rank
        self._products: dict[int, CudaProduct] = {}  # by the weight's id
        rank, end = _aligned(max_rank), 0
        for target in self.targets.values():
            weight = target.weight
            if id(weight) not in self._products:
                product = CudaProduct(_ends_of(weight), weight.columns, rank, end)
                self._products[id(weight)], end = product, product.end
        self._is_pinned = device.type == "cuda"
        self.pool = torch.zeros(num_slots, _aligned(end), dtype=dtype, device=device)
        self.ranks = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._residents: list[weakref.ref[CudaAdapter] | None] = [None] * num_slots
        self._last_used = [0] * num_slots  # number of the last `place` that used each slot
        self._num_placed = 0

    def product(self, weight: AdaptableWeight) -> CudaProduct | None:
        """Return a product's place in a slot; None if no adapter can change it."""
        return self._products.get(id(weight))

    def pack(self, deltas: Mapping[str, Delta]) -> CudaAdapter:
        """Return an adapter that adds these deltas to their targets.

        The scale is multiplied into `up` before it is rounded to the pool's dtype.

        Raises:
            ValueError: as `AdapterLayout.pack`.
        """
        values = torch.zeros(self.pool.shape[1], dtype=self.pool.dtype, pin_memory=self._is_pinned)
        for changes in changes_by_weight(self.targets, deltas, self.max_rank):
            weight = changes[0][1].weight
            product, changed = self._products[id(weight)], set[int]()
            downs = values[product.down : product.up].view(len(product.ends), product.rank, product.columns)
            ups = values[product.up : product.end].view(product.rows, product.rank)
            starts = (0, *product.ends[:-1])
            for name, target, delta in changes:
                rank = delta.down.shape[0]
                for piece, (start, stop) in enumerate(zip(starts, product.ends, strict=True)):
                    if not target.start <= start < stop <= target.stop:
                        continue
                    if piece in changed:
                        raise ValueError(f"{name} has rows that another target of the adapter has, too")
                    changed.add(piece)
                    up = delta.scale * delta.up[start - target.start : stop - target.start]
                    if not up.to(values.dtype).isfinite().all():
                        raise ValueError(f"{name} has a value that is too large for {values.dtype}")
                    downs[piece, :rank] = delta.down
                    ups[start:stop, :rank] = _in_device_order(weight, piece, up)
        return CudaAdapter(values, _aligned(max(delta.down.shape[0] for delta in deltas.values())))

    def place(self, adapters: Sequence[CudaAdapter]) -> list[int]:
        """Return the slot of each of a step's different adapters, after beginning to copy those not there.

        Takes the slots that have not been used for the longest time. Copies are made on the current stream,
        so steps launched before still read the slots' former adapters.

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
                self.pool[slot].copy_(adapter.values, non_blocking=True)
                self.ranks[slot].fill_(adapter.rank)
                self._residents[slot], self._last_used[slot] = weakref.ref(adapter), self._num_placed
            slots.append(slot)
        return slots


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _ends_of(weight: AdaptableWeight) -> tuple[int, ...]:
    """Return the last row, plus one, of each matrix that is stacked in a weight."""
    if isinstance(weight, GateUpWeight):
        return weight.intermediate_size, 2 * weight.intermediate_size
    if isinstance(weight, QkvWeight):
        queries, keys = weight.num_heads * weight.head_dim, weight.num_kv_heads * weight.head_dim
        return queries, queries + keys, queries + 2 * keys
    return (weight.rows,)


def _in_device_order(weight: AdaptableWeight, piece: int, up: Tensor) -> Tensor:
    """Return a piece's rows in the order of the device's matrix, as `Repacking.qkv` stacks it."""
    if not isinstance(weight, QkvWeight) or not weight.is_interleaved or piece == 2:
        return up
    return up[joined_halves(weight, (weight.num_heads, weight.num_kv_heads)[piece])]
