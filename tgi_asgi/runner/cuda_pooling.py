"""Vectors of prompts on a CUDA device: what is copied to the host, and when.

A vector of one token's state, or of its logits, is copied with the step's other results: the launcher's
thread does not wait for it. A pooling over all tokens is summed on the host, which waits for the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.models.pooling import Dense
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.cuda import CudaProgram
from tgi_asgi.runner.cuda_device import Device
from tgi_asgi.runner.cuda_layout import StepLayout
from tgi_asgi.runner.plan import StepRow
from tgi_asgi.runner.pooling import Pooler, apply_dense
from tgi_asgi.types import PoolingKind


@dataclass(frozen=True, slots=True)
class StepVectors:
    """The vectors of a step's rows; those in `states` and `logits` are valid once the device has got so far.

    Attributes:
        complete: By row index: vectors that are already there.
        states: [n_rows, hidden], for the rows of `last`; None: for no row.
        logits: The chosen logits of all rows of `chosen`, one row after another; None: of no row.
        chosen: By row index: number of logits.
    """

    complete: dict[int, Floats]
    states: Floats | None
    last: Sequence[int]
    logits: Floats | None
    chosen: dict[int, int]
    dense: Sequence[Dense]

    def collect(self) -> dict[int, Floats]:
        """Return all vectors, by row index, in memory of their own, once the device has finished the step."""
        vectors = dict(self.complete)
        if self.states is not None:
            for index, state in zip(self.last, self.states.copy(), strict=True):
                vectors[index] = apply_dense(self.dense, state)
        if self.logits is not None:
            ends = np.cumsum(list(self.chosen.values()))[:-1]
            vectors.update(zip(self.chosen, np.split(self.logits.copy(), ends), strict=True))
        return vectors


class CudaPooler:
    """Pools the rows of a CUDA runner's steps.

        pooler.forget(slot)                      # for each slot start of a step
        vectors = pooler.take(plan.rows, layout)   # after the step's forward pass has been launched
        result.pooled = vectors.collect()        # on the thread that waited for the step

    Args:
        dense: Dense layers applied to vectors of states.
    """

    def __init__(self, program: CudaProgram, device: Device, dense: Sequence[Dense]) -> None:
        self._program, self._device, self._dense = program, device, dense
        self._over_all = Pooler(self._hidden, dense)

    def forget(self, slot: int) -> None:
        """Drop a slot's state; another sequence uses the slot."""
        self._over_all.forget(slot)

    def take(self, rows: Sequence[StepRow], layout: StepLayout) -> StepVectors | None:
        """Begin to copy the vectors of the rows that request one; None if there are none.

        Waits for the device if a vector is of all tokens.

        Raises:
            ValueError: as `Pooler.take`.
        """
        complete: dict[int, Floats] = {}
        last: list[int] = []
        chosen: dict[int, tuple[int, ...]] = {}
        for index, row in enumerate(rows):
            if row.pooling is None:
                continue
            if row.pooling.needs_all:
                vector = self._over_all.take(layout.end(index) - row.num_tokens, row)
                if vector is not None:
                    complete[index] = vector
            elif not row.samples:
                continue
            elif row.pooling.kind is PoolingKind.LOGITS:
                chosen[index] = row.pooling.token_ids
            else:
                last.append(index)
        if not (complete or last or chosen):
            return None
        return StepVectors(
            complete,
            self._fetch(self._program.hidden([layout.end(index) - 1 for index in last])) if last else None,
            last,
            self._logits_of(chosen, layout) if chosen else None,
            {index: len(ids) for index, ids in chosen.items()},
            self._dense,
        )

    def _logits_of(self, chosen: dict[int, tuple[int, ...]], layout: StepLayout) -> Floats:
        """Begin to copy the chosen logits of rows, all at once."""
        rows = dict(zip(chosen, layout.logits_rows(list(chosen)), strict=True))
        of_rows = [rows[index] for index, ids in chosen.items() for _ in ids]
        ids = [token for each in chosen.values() for token in each]
        at = torch.tensor([of_rows, ids]).to(self._device.device, non_blocking=True)
        return self._fetch(self._program.logits[at[0], at[1]])

    def _fetch(self, values: Tensor) -> Floats:
        """Begin to copy float32 values to pinned memory of their own."""
        host = self._device.pinned(values.nbytes).view(values.dtype).view(values.shape)
        host.copy_(values, non_blocking=True)
        found: Floats = host.numpy()
        return found

    def _hidden(self, start: int, stop: int) -> Floats:
        found: Floats = self._program.hidden(range(start, stop)).cpu().numpy()
        return found
