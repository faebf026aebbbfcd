"""Devices that compute a model's steps together, a process each, with some heads, columns and words each.

Their sums and logits are collectives of `torch.distributed`, in the order of the program's calls: NCCL's on
CUDA devices, which graphs hold as they hold kernels; gloo's where these are emulated.
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
_TIMEOUT = timedelta(minutes=2)  # of collectives outside of graphs
_MEETING = timedelta(hours=1)  # until all have met: some load for longer; who has died is noticed otherwise
_END_S = 5.0
# Named `all_gather_single` since torch 2.13, where the old name warns.
_FileStore: Any = dist.FileStore  # type: ignore[attr-defined]
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class DeviceGroup:
    """The processes, which call the same collectives in the same order, each with its own device.

        group = DeviceGroup("nccl", store, rank=1, count=2, device=torch.device("cuda", 1))
        group.sum(part)
        group.close()

    A process has one at a time. Collectives run on the current stream, and none waits for the device. Once it
    is given up they raise `RuntimeError`.

    Args:
        backend: of `torch.distributed`.
        store: a file in a folder of their own, by which the processes find each other.
    """

    def __init__(self, backend: str, store: Path, *, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count = rank, count
        self._device = device
        # NCCL's watchdog would end this process when it finds another dead; here clients are told first.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        meeting = _FileStore(str(store), count)
        meeting.set_timeout(_MEETING)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=count, timeout=_TIMEOUT)
        self._group: Any = dist.group.WORLD
        self._is_given_up = False

    def sum(self, part: Tensor) -> None:
        """Make `part`, contiguous, the sum of all ranks', added in an order that is the library's."""
        self._check()
        dist.all_reduce(part)

    def gather(self, part: Tensor, out: Tensor) -> None:
        """Write all ranks' parts, contiguous, to out [count, *part.shape]."""
        self._check()
        _all_gather(out.view(-1, *part.shape[1:]), part)

    def send(self, value: Tensor) -> None:
        """Make `value` what rank 0 has in it."""
        self._check()
        dist.broadcast(value, 0)

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values; waits for all of them."""
        held = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)

    def abort(self) -> None:
        """Have nothing wait for a process that has ended; what collectives give then means nothing.

        It goes on in a thread: NCCL's ends when no graph is left that has collectives of it.
        """
        self._is_given_up = True
        _within(0, self._group.abort)

    def close(self) -> None:
        """End the group, once no graph is left that has its collectives; in seconds, whatever others do."""
        _within(_END_S, dist.destroy_process_group)

    def _check(self) -> None:
        if self._is_given_up:
            raise RuntimeError("the other shards of the model are given up")


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Wait so long for a call, which may never return; what it raises is told in the log alone."""

    def run() -> None:
        try:
            call()
        except Exception:
            logger.warning("the group of shards did not end as it should", exc_info=True)

    thread = threading.Thread(target=run, name="tgi-group", daemon=True)
    thread.start()
    thread.join(seconds)


@dataclass(frozen=True, slots=True)
class CudaShard:
    """What a program must know to be one of several.

    Attributes:
        words: of the vocabulary, those of each rank.
    """

    group: DeviceGroup
    words: Sequence[range]

    @property
    def own_words(self) -> range:
        """Those whose embeddings and logits are made here."""
        return self.words[self.group.rank]

    def embed(self, ids: Tensor, table: Tensor, out: Tensor) -> None:
        """Write the embeddings of ids [n_tokens] to out [n_tokens, columns]; the table has own words."""
        ids = ids - self.own_words.start
        _kernels.embed(ids, table, out)  # which takes others' ids for the first or the last
        others = (ids < 0) | (ids >= len(self.own_words))
        self.group.sum(out.masked_fill_(others.unsqueeze(1), 0.0))

    def add(self, part: Tensor, parts: Tensor | None) -> None:
        """Make `part` [n_tokens, columns], contiguous, the sum of all ranks' in place.

        Args:
            parts: room for at least those of all ranks: then they are added in the order of ranks, in
                float32, so that a token's bits do not depend on how many others there are.
        """
        if parts is None:
            self.group.sum(part)
            return
        gathered = parts[: self.group.count * part.numel()].view(self.group.count, *part.shape)
        self.group.gather(part, gathered)
        total = gathered[0].float()
        for other in gathered[1:]:
            total = total + other
        part.copy_(total)


class WholeLogits:
    """The logits of all ranks' words, from each rank's own.

    Attributes:
        logits: [max_rows, vocab] float32.
    """

    def __init__(self, shard: CudaShard, max_rows: int, device: torch.device) -> None:
        self._group, self._words = shard.group, shard.words
        self._width = max(map(len, shard.words))  # collectives want parts of one size
        self._part = torch.zeros(max_rows * self._width, device=device)
        self._parts = torch.zeros(shard.group.count * max_rows * self._width, device=device)
        self.logits = torch.zeros(max_rows, shard.words[-1].stop, device=device)

    def join(self, own: Tensor) -> None:
        """Write the first of `logits` from own [n_rows, n_words]."""
        n, count, width = own.shape[0], self._group.count, self._width
        part = self._part[: n * width].view(n, width)
        part[:, : own.shape[1]] = own
        parts = self._parts[: count * n * width].view(count, n, width)
        self._group.gather(part, parts)
        for words, logits in zip(self._words, parts, strict=True):
            self.logits[:n, words.start : words.stop] = logits[:, : len(words)]
