"""CUDA tensor parallelism: one shard per device, each with some of the heads, columns and vocabulary.

Sums and logits are collectives of `torch.distributed`, in the order of the program's calls. CUDA devices use
NCCL, whose collectives graphs capture like kernels; emulated devices use gloo.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

_kernels: Any = torch.ops.tgi_cuda
_TIMEOUT = timedelta(minutes=2)  # for collectives outside graphs
_MEETING = timedelta(hours=1)  # for all shards to join: some load for longer; a dead one is noticed otherwise
_END_S = 5.0  # for leaving the group
_FileStore: Any = dist.FileStore  # type: ignore[attr-defined]
# Named `all_gather_single` since torch 2.13, which warns about the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class DeviceGroup:
    """The shards, one device each, which call the same collectives in the same order.

        group = DeviceGroup("nccl", store, rank=1, count=2, device=torch.device("cuda", 1))
        group.all_reduce(part)
        group.close()

    A shard has one group at a time. Collectives run on the current stream and do not wait for the device.
    After `abort` they raise `RuntimeError`.

    Args:
        backend: Backend of `torch.distributed`.
        store: File in a folder of the group's own, through which the shards find each other.
    """

    def __init__(self, backend: str, store: Path, *, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count = rank, count
        self._device = device
        # NCCL's watchdog would end this process when it finds another shard dead; here clients must first get
        # their errors.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # torch 2.15's new backend makes its communicator here, where nobody notices that a shard has died.
        os.environ.setdefault("TORCH_DIST_USE_NCCL2", "0")
        meeting = _FileStore(str(store), count)
        meeting.set_timeout(_MEETING)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=count, timeout=_TIMEOUT)
        self._group: Any = dist.group.WORLD
        self._is_aborted = False

    def all_reduce(self, part: Tensor) -> None:
        """Replace `part`, contiguous, by the sum over all shards, in an order that the library chooses."""
        self._check()
        dist.all_reduce(part)

    def all_gather(self, part: Tensor, out: Tensor) -> None:
        """Write all shards' parts, contiguous, to out [count, *part.shape]."""
        self._check()
        _all_gather(out.view(-1, *part.shape[1:]), part)

    def broadcast(self, value: Tensor) -> None:
        """Replace `value` on every shard by shard 0's."""
        self._check()
        dist.broadcast(value, 0)

    def all_reduce_min(self, value: int) -> int:
        """Return the minimum of all shards' values; waits for all of them."""
        held = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)

    def abort(self) -> None:
        """Stop waiting for shards that have ended; results of collectives are meaningless from then on.

        The abort itself continues in a thread: NCCL's ends only when no graph is left that holds its
        collectives.
        """
        self._is_aborted = True
        _within(0, self._group.abort)

    def close(self) -> None:
        """End the group, once no graph holds its collectives; takes seconds, whatever other shards do."""
        _within(_END_S, dist.destroy_process_group)

    def _check(self) -> None:
        if self._is_aborted:
            raise RuntimeError("the model's group of shards has been aborted")


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Wait up to `seconds` for a call that may never return; its exceptions are only logged."""

    def run() -> None:
        try:
            call()
        except Exception:
            logger.warning("closing the group of shards failed", exc_info=True)

    thread = threading.Thread(target=run, name="tgi-group", daemon=True)
    thread.start()
    thread.join(seconds)


@dataclass(frozen=True, slots=True)
class CudaShard:
    """A program's place among the shards.

    Attributes:
        vocab_ranges: Range of vocabulary ids of each shard, by rank.
    """

    group: DeviceGroup
    vocab_ranges: Sequence[range]

    @property
    def own_vocab_range(self) -> range:
        """Vocabulary ids whose embeddings and logits this shard computes."""
        return self.vocab_ranges[self.group.rank]

    def embed(self, ids: Tensor, table: Tensor, out: Tensor) -> None:
        """Write the embeddings of ids [n_tokens] to out [n_tokens, columns]; the table is this shard's."""
        ids = ids - self.own_vocab_range.start
        _kernels.embed(ids, table, out)  # clamps other shards' ids to the first or last row
        others = (ids < 0) | (ids >= len(self.own_vocab_range))
        self.group.all_reduce(out.masked_fill_(others.unsqueeze(1), 0.0))

    def add(self, part: Tensor, parts: Tensor | None) -> None:
        """Replace `part` [n_tokens, columns], contiguous, by the sum over all shards.

        Args:
            parts: Buffer for at least all shards' parts, or None. With a buffer, parts are added in float32
                in the order of ranks, so that a token's bits do not depend on how many others there are.
        """
        if parts is None:
            self.group.all_reduce(part)
            return
        gathered = parts[: self.group.count * part.numel()].view(self.group.count, *part.shape)
        self.group.all_gather(part, gathered)
        total = gathered[0].float()
        for other in gathered[1:]:
            total = total + other
        part.copy_(total)


class WholeLogits:
    """The logits of all shards' vocabulary ranges, gathered from each shard's own.

    Attributes:
        logits: [max_rows, vocab] float32.
    """

    def __init__(self, shard: CudaShard, max_rows: int, device: torch.device) -> None:
        self._group, self._vocab_ranges = shard.group, shard.vocab_ranges
        self._width = max(map(len, shard.vocab_ranges))  # collectives need parts of equal size
        self._part = torch.zeros(max_rows * self._width, device=device)
        self._parts = torch.zeros(shard.group.count * max_rows * self._width, device=device)
        self.logits = torch.zeros(max_rows, shard.vocab_ranges[-1].stop, device=device)

    def join(self, own: Tensor) -> None:
        """Write the first rows of `logits` from own [n_rows, n_ids]."""
        n, count, width = own.shape[0], self._group.count, self._width
        part = self._part[: n * width].view(n, width)
        part[:, : own.shape[1]] = own
        parts = self._parts[: count * n * width].view(count, n, width)
        self._group.all_gather(part, parts)
        for ids, logits in zip(self._vocab_ranges, parts, strict=True):
            self.logits[:n, ids.start : ids.stop] = logits[:, : len(ids)]
