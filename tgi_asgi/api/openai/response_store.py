"""The newest answers of `/v1/responses`, by API key, in memory: later requests may build on them.

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

    def __init__(self, max_responses: int, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._stores: dict[str | None, _TenantStore] = {}  # by tenant

    @property
    def is_on(self) -> bool:
        """Whether answers are stored at all."""
        return self._max_responses > 0

    @property
    def size(self) -> int:
        """Bytes of everything stored."""
        return sum(store.size for store in [*self._stores.values()])

    def add(self, stored: StoredResponse, tenant: str | None) -> None:
        """Store a tenant's answer; at the limit, drop the oldest of the tenant that holds most."""
        if sum(map(len, stored.parts)) > self._max_bytes:
            return
        with self._lock:
            self._stores.setdefault(tenant, _TenantStore()).add(stored)
            self._evict(self._max_responses, lambda store: len(store.responses))
            self._evict(self._max_bytes, lambda store: store.size)

    def find(self, response_id: str, tenant: str | None) -> StoredResponse | None:
        """Return a tenant's answer by id, or None."""
        store = self._stores.get(tenant)
        return store.responses.get(response_id) if store is not None else None

    def find_item(self, item_id: str, tenant: str | None) -> bytes | None:
        """Return an item of a tenant's answers by id, as a list of one, or None."""
        store = self._stores.get(tenant)
        return store.items.get(item_id) if store is not None else None

    def delete(self, response_id: str, tenant: str | None) -> None:
        """Drop a tenant's answer, if it exists."""
        with self._lock:
            if self.find(response_id, tenant) is not None:
                self._stores[tenant].drop(response_id)

    def _evict(self, limit: int, size_of: Callable[[_TenantStore], int]) -> None:
        stores = self._stores.values()
        while sum(map(size_of, stores)) > limit:
            fullest = max(stores, key=size_of)
            fullest.drop(next(iter(fullest.responses)))


class _TenantStore:
    """One tenant's answers, oldest first; parts that several of them share count once."""

    def __init__(self) -> None:
        self.responses: dict[str, StoredResponse] = {}
        self.items: dict[str, bytes] = {}
        self.size = 0
        self._uses: Counter[int] = Counter()  # by the part's id()

    def add(self, stored: StoredResponse) -> None:
        self.responses[stored.id] = stored
        self.items |= stored.items
        for part in stored.parts:
            self.size += 0 if self._uses[id(part)] else len(part)
            self._uses[id(part)] += 1

    def drop(self, response_id: str) -> None:
        stored = self.responses.pop(response_id)
        for item_id in stored.items:
            del self.items[item_id]
        for part in stored.parts:
            self._uses[id(part)] -= 1
            if not self._uses[id(part)]:
                del self._uses[id(part)]
                self.size -= len(part)
