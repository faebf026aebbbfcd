"""Answers of `/v1/responses` that later requests may build on: a bounded number, in memory, by API key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.settings import MIB

Item = dict[str, Any]

MAX_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer, and all items up to its end, those of the responses before it included.

    Attributes:
        tenant: whose it is; nobody else finds it.
        size: of the whole as JSON, in bytes.
    """

    tenant: str | None
    body: dict[str, Any]
    items: Sequence[Item]
    size: int


class ResponseStore:
    """The newest answers, up to a number and to 64 MiB of JSON."""

    def __init__(self, most: int, max_bytes: int = MAX_BYTES) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._size = 0
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()

    def keep(self, stored: StoredResponse) -> None:
        """Keep an answer by its id; the oldest go where there is no room."""
        if stored.size > self._max_bytes or not self._most:
            return
        self._kept[stored.body["id"]] = stored
        self._size += stored.size
        while len(self._kept) > self._most or self._size > self._max_bytes:
            self._size -= self._kept.popitem(last=False)[1].size

    def find(self, response_id: str, tenant: str | None) -> StoredResponse | None:
        """Return a tenant's answer by its id."""
        stored = self._kept.get(response_id)
        return stored if stored is not None and stored.tenant == tenant else None

    def find_item(self, item_id: str, tenant: str | None) -> Item | None:
        """Return an item of a tenant's newest answers by its id."""
        for stored in reversed(list(self._kept.values())):
            if stored.tenant == tenant:
                for item in stored.items:
                    if item.get("id") == item_id:
                        return item
        return None

    def forget(self, response_id: str, tenant: str | None) -> bool:
        """Drop a tenant's answer; return whether it was there."""
        stored = self.find(response_id, tenant)
        if stored is not None:
            del self._kept[response_id]
            self._size -= stored.size
        return stored is not None
