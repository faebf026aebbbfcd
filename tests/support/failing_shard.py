"""A shard that fails to load, in a module of its own: the shard's process imports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True, slots=True)
class FailingShard:
    """A `ShardJob` whose `load` raises an error."""

    error: Exception
    rank: int = 1
    descriptors: tuple[int, ...] = ()

    def load(self, connection: Connection) -> Callable[[], None]:
        """Raise the error."""
        raise self.error
