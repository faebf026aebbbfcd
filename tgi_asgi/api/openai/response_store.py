"""Answers of `/v1/responses` that later requests may build on: a bounded number, in memory, by API key.

All is kept as JSON: a long conversation as objects would take ten times the memory, and long to be freed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tgi_asgi.settings import MIB

MAX_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer, and all that was said up to its end.

    Attributes:
        tenant: whose it is; nobody else finds it.
        body: of the answer, as the client got it.
        history: of this response and those before it, in order: the input (a text or items), the output.
        items: the output's, by their ids.
    """

    tenant: str | None
    id: str
    body: bytes
    history: Sequence[bytes]
    items: Mapping[str, bytes]

    @property
    def size(self) -> int:
        return len(self.body) + sum(map(len, self.history))


class ResponseStore:
    """The newest answers, up to a number and to 64 MiB of JSON. Threads may share it: they render answers."""

    def __init__(self, most: int, max_bytes: int = MAX_BYTES) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._by_item: dict[str, StoredResponse] = {}
        self.size = 0

    def keep(self, stored: StoredResponse) -> None:
        """Keep an answer; the oldest go where there is no room."""
        if stored.size > self._max_bytes or not self._most:
            return
        with self._lock:
            self._kept[stored.id] = stored
            self._by_item |= dict.fromkeys(stored.items, stored)
            self.size += stored.size
            while len(self._kept) > self._most or self.size > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def find(self, response_id: str, tenant: str | None) -> StoredResponse | None:
        """Return a tenant's answer by its id."""
        stored = self._kept.get(response_id)
        return stored if stored is not None and stored.tenant == tenant else None

    def find_item(self, item_id: str, tenant: str | None) -> bytes | None:
        """Return an item of a tenant's answers by its id."""
        stored = self._by_item.get(item_id)
        return stored.items[item_id] if stored is not None and stored.tenant == tenant else None

    def forget(self, response_id: str, tenant: str | None) -> bool:
        """Drop a tenant's answer; return whether it was there."""
        with self._lock:
            is_there = self.find(response_id, tenant) is not None
            if is_there:
                self._drop(response_id)
        return is_there

    def _drop(self, response_id: str) -> None:
        stored = self._kept.pop(response_id)
        self.size -= stored.size
        for item_id in stored.items:
            del self._by_item[item_id]
