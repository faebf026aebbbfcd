"""CPU tensor parallelism: several shards compute a model's steps, each with some heads and columns.

`linear`, `linear_add`, `experts` and `experts_add` sum over the shards' columns for weights that are marked
partial (`is_partial`), and so does `embed`, since a shard has only some rows of its table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tgi_asgi import _C
from tgi_asgi.ops import layout
from tgi_asgi.ops.step_limits import StepLimits


@dataclass(frozen=True, slots=True)
class Shard:
    """A program's place among the shards.

    Attributes:
        group: The memory that all shards share; shard 0 leads, the others `follow`.
        first_vocab_id: First vocabulary id that this shard has.
    """

    group: _C.ShardGroup
    first_vocab_id: int


@dataclass(frozen=True, slots=True)
class ShardMemory:
    """Size of the memory that the shards share; every shard opens the same one."""

    count: int  # number of shards
    num_threads: int  # threads per shard
    num_columns: int  # of the residual
    limits: StepLimits
    vocab_size: int
    num_groups: int  # groups of layers that share block tables
    table_width: int  # blocks of the longest sequence

    def create(self) -> int:
        """Return a descriptor of the memory, all zero.

        Raises:
            OSError: if the system does not provide such memory.
        """
        fd = os.memfd_create("tgi-shards")
        os.ftruncate(fd, self._shape().num_bytes)
        return fd

    def open(self, fd: int, rank: int) -> _C.ShardGroup:
        """Map the memory as the shard of this rank."""
        return _C.ShardGroup(fd=fd, rank=rank, shape=self._shape())

    def _shape(self) -> _C.ShardShape:
        return _C.ShardShape(
            count=self.count, num_members=self.num_threads,
            num_columns=layout.round_up(self.num_columns), max_tokens=self.limits.max_tokens,
            max_sequences=self.limits.max_sequences, max_rows=self.limits.max_rows,
            vocab_size=self.vocab_size, num_groups=self.num_groups, table_width=self.table_width,
        )  # fmt: skip
