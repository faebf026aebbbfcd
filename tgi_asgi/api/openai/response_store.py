"""Stored answers of `/v1/responses` that later requests may build on: a bounded number, in memory, per API
key.

Everything is stored as JSON: long conversations as objects would use ten times the memory and be slow to
free.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tgi_asgi.settings import MIB

MAX_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer with the conversation up to its end.

    Attributes:
        body: The answer as the client received it.
        history: The conversation in order, as lists of items; shared with responses that continue it.
        items: The output's items by id; in the history, each is a list of one.
    """

    id: str
    body: bytes
    history: Sequence[bytes]
    items: Mapping[str, bytes]

    @property
    def parts(self) -> Sequence[bytes]:
        return self.body, *self.history


class ResponseStore:
    """The newest answers, limited by number and to 64 MiB of JSON. Thread-safe: threads render answers."""

    def __init__(self, most: int, max_bytes: int = MAX_BYTES) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._shelves: dict[str | None, _Shelf] = {}  # by tenant

    @property
    def size(self) -> int:
        """Bytes of everything stored."""
        return sum(shelf.size for shelf in [*self._shelves.values()])

    def keep(self, stored: StoredResponse, tenant: str | None) -> None:
        """Store a tenant's answer; at the limit, drop the oldest of the tenant that holds most."""
        if not self._most or sum(map(len, stored.parts)) > self._max_bytes:
            return
        with self._lock:
            self._shelves.setdefault(tenant, _Shelf()).add(stored)
            self._make_room(self._most, lambda shelf: len(shelf.kept))
            self._make_room(self._max_bytes, lambda shelf: shelf.size)

    def find(self, response_id: str, tenant: str | None) -> StoredResponse | None:
        """Return a tenant's answer by id, or None."""
        shelf = self._shelves.get(tenant)
        return shelf.kept.get(response_id) if shelf is not None else None

    def find_item(self, item_id: str, tenant: str | None) -> bytes | None:
        """Return an item of a tenant's answers by id, as a list of one, or None."""
        shelf = self._shelves.get(tenant)
        return shelf.items.get(item_id) if shelf is not None else None

    def forget(self, response_id: str, tenant: str | None) -> None:
        """Drop a tenant's answer, if it exists."""
        with self._lock:
            if self.find(response_id, tenant) is not None:
                self._shelves[tenant].drop(response_id)

    def _make_room(self, most: int, held: Callable[[_Shelf], int]) -> None:
        shelves = self._shelves.values()
        while sum(map(held, shelves)) > most:
            fullest = max(shelves, key=held)
            fullest.drop(next(iter(fullest.kept)))


class _Shelf:
    """One tenant's answers, oldest first; parts that several of them share count once."""

    def __init__(self) -> None:
        self.kept: dict[str, StoredResponse] = {}
        self.items: dict[str, bytes] = {}
        self.size = 0
        self._uses: Counter[int] = Counter()  # by the part's id()

    def add(self, stored: StoredResponse) -> None:
        self.kept[stored.id] = stored
        self.items |= stored.items
        for part in stored.parts:
            self.size += 0 if self._uses[id(part)] else len(part)
            self._uses[id(part)] += 1

    def drop(self, response_id: str) -> None:
        stored = self.kept.pop(response_id)
        for item_id in stored.items:
            del self.items[item_id]
        for part in stored.parts:
            self._uses[id(part)] -= 1
            if not self._uses[id(part)]:
                del self._uses[id(part)]
                self.size -= len(part)
