"""One of several processes that compute a model's steps together, each with some heads and columns.

Sums over columns that shards have apart are made by `linear` and `linear_add` of weights that say so
(`LinearWeight.is_partial`), and by `embed`, of whose table a shard has some rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tgi_asgi import _C
from tgi_asgi.ops import layout


@dataclass(frozen=True, slots=True)
class Shard:
    """What a program must know to be one of several.

    Attributes:
        group: the memory that all share; its first member leads, the others `follow`.
        first_word: of the vocabulary's rows that this shard has.
    """

    group: _C.ShardGroup
    first_word: int


@dataclass(frozen=True, slots=True)
class ShardMemory:
    """How large the memory is that shards share: each of them opens the same."""

    count: int  # shards
    num_threads: int  # of each
    num_columns: int  # of the residual
    max_tokens: int  # of a step, as what follows
    max_sequences: int
    max_rows: int  # of logits
    vocab_size: int
    num_groups: int  # of layers that share block tables
    table_width: int  # blocks of the longest sequence

    def create(self) -> int:
        """Return a descriptor of the memory, all zero.

        Raises:
            OSError: the system has no such memory.
        """
        fd = os.memfd_create("tgi-shards")
        os.ftruncate(fd, self._shape().num_bytes)
        return fd

    def open(self, fd: int, rank: int) -> _C.ShardGroup:
        """Map the memory."""
        return _C.ShardGroup(fd=fd, rank=rank, shape=self._shape())

    def _shape(self) -> _C.ShardShape:
        padded = -(-self.num_columns // layout.STRIP) * layout.STRIP
        return _C.ShardShape(
            count=self.count, num_members=self.num_threads, num_columns=padded, max_tokens=self.max_tokens,
            max_sequences=self.max_sequences, max_rows=self.max_rows, vocab_size=self.vocab_size,
            num_groups=self.num_groups, table_width=self.table_width,
        )  # fmt: skip
