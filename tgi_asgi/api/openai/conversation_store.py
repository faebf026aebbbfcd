"""The conversations of `/v1/conversations`, by API key, in memory: answers are added to the one they name.

Items are stored as JSON, each as a list of one, as in `response_store.py`.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tgi_asgi.api.openai.pages import listed
from tgi_asgi.api.openai.response_items import new_id
from tgi_asgi.api.openai.response_store import MAX_BYTES

_OWN_BYTES = 512  # what an item or a conversation takes besides its JSON, so that small ones count, too


@dataclass(slots=True)
class StoredConversation:
    """A conversation; only its store changes it.

    Attributes:
        items: Its items in order, by id.
        size: Bytes of the items and the metadata.
    """

    id: str
    created_at: int
    metadata: Mapping[str, str]
    items: dict[str, bytes] = field(default_factory=dict)
    size: int = _OWN_BYTES

    def __post_init__(self) -> None:
        self.size += size_of_items(self.items) + _size_of_metadata(self.metadata)


class ConversationStore:
    """The conversations used last, limited by number and bytes. Thread-safe: threads render answers."""

    def __init__(self, max_conversations: int, max_bytes: int = MAX_BYTES) -> None:
        self._max_conversations = max_conversations
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # By tenant and id, the one used last at the end.
        self._tenants: dict[str | None, dict[str, StoredConversation]] = {}

    @property
    def is_on(self) -> bool:
        """Whether conversations are stored at all."""
        return self._max_conversations > 0

    @property
    def size(self) -> int:
        """Bytes of everything stored."""
        with self._lock:
            return sum(map(_size_of_all, self._tenants.values()))

    def add(self, conversation: StoredConversation, tenant: str | None) -> bool:
        """Store a tenant's new conversation; return whether it is small enough."""
        if conversation.size > self._max_bytes:
            return False
        with self._lock:
            self._tenants.setdefault(tenant, {})[conversation.id] = conversation
            self._evict()
        return True

    def find(self, conversation_id: str, tenant: str | None) -> StoredConversation | None:
        """Return a tenant's conversation by id, which counts as a use of it, or None."""
        with self._lock:
            own = self._tenants.get(tenant, {})
            found = own.pop(conversation_id, None)
            if found is not None:
                own[conversation_id] = found
            return found

    def items_of(self, conversation: StoredConversation) -> dict[str, bytes]:
        """Return a conversation's items as they are now."""
        with self._lock:
            return dict(conversation.items)

    def append(
        self, conversation: StoredConversation, items: Mapping[str, bytes]
    ) -> Mapping[str, bytes] | None:
        """Add items at the end, each with another id if its own is taken.

        Args:
            items: As `stored_form` makes them; those whose ids are new may have any form.

        Returns:
            The items as they are stored; None, and none is added, if the conversation would be too large.
        """
        while True:
            with self._lock:
                taken = conversation.items.keys() & items.keys()
                if not taken:
                    size = size_of_items(items)
                    if conversation.size + size > self._max_bytes:
                        return None
                    conversation.items |= items
                    conversation.size += size
                    self._evict()
                    return items
            items = _with_new_ids(items, taken)  # without the lock: copying large items takes milliseconds

    def describe(self, conversation: StoredConversation, metadata: Mapping[str, str]) -> None:
        """Replace a conversation's metadata."""
        with self._lock:
            conversation.size += _size_of_metadata(metadata) - _size_of_metadata(conversation.metadata)
            conversation.metadata = metadata
            self._evict()

    def drop_item(self, conversation: StoredConversation, item_id: str) -> bool:
        """Drop an item; return whether there was one."""
        with self._lock:
            item = conversation.items.pop(item_id, None)
            if item is None:
                return False
            conversation.size -= size_of_items({item_id: item})
            return True

    def delete(self, conversation_id: str, tenant: str | None) -> None:
        """Drop a tenant's conversation, if it exists."""
        with self._lock:
            self._tenants.get(tenant, {}).pop(conversation_id, None)

    def _evict(self) -> None:
        """At a limit, drop the conversation unused for longest of the tenant that holds most."""
        limits: tuple[tuple[int, Callable[[dict[str, StoredConversation]], int]], ...] = (
            (self._max_conversations, len),
            (self._max_bytes, _size_of_all),
        )
        for limit, measure in limits:
            while sum(map(measure, self._tenants.values())) > limit:
                fullest = max(self._tenants.values(), key=measure)
                del fullest[next(iter(fullest))]


def stored_form(items: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Return a request's items as a conversation stores them, by id: with the id first, then the type.

    An item gets another id if an earlier one has the same: clients that make ids up (openai-agents, for
    models that answer chats) give all items the same.
    """
    stored: dict[str, bytes] = {}
    owner = secrets.token_hex(16)
    for i, given in enumerate(items):
        item = listed(given, owner, i)
        item_id, kind = item.pop("id"), item.pop("type")
        if item_id in stored:
            item_id = _new_id(is_message=kind == "message")
        stored[item_id] = msgspec.json.encode([{"id": item_id, "type": kind, **item}])
    return stored


def size_of_items(items: Mapping[str, bytes]) -> int:
    """Return the bytes that items count."""
    return sum(len(item) + _OWN_BYTES for item in items.values())


def _with_new_ids(items: Mapping[str, bytes], ids: Collection[str]) -> dict[str, bytes]:
    """Return items in the same order, those with these ids under new ones.

    Their JSON is not decoded: this may run deeper in the stack than what decoded it first, and fail at items
    nested as deeply as the stack then allowed.
    """
    renamed: dict[str, bytes] = {}
    for item_id, stored in items.items():
        if item_id in ids:
            start = _start(item_id)
            assert stored.startswith(start), "only items of `stored_form` can have a taken id"
            rest = stored[len(start) :]
            item_id = _new_id(is_message=rest.startswith(b',"type":"message"'))
            stored = _start(item_id) + rest
        renamed[item_id] = stored
    return renamed


def _start(item_id: str) -> bytes:
    """Return the start of an item's stored form, up to the end of its id."""
    return b'[{"id":' + msgspec.json.encode(item_id)


def _new_id(*, is_message: bool) -> str:
    return new_id("msg" if is_message else "item")


def _size_of_metadata(metadata: Mapping[str, str]) -> int:
    return 4 * sum(len(name) + len(value) for name, value in metadata.items())  # 4 bytes a character at most


def _size_of_all(conversations: Mapping[str, StoredConversation]) -> int:
    return sum(conversation.size for conversation in conversations.values())
