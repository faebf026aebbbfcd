"""`/v1/conversations`: lists of items that responses continue and are added to."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import msgspec

from tgi_asgi.api.exchange import LARGE_BODY, Exchange
from tgi_asgi.api.openai.conversation_store import ConversationStore, StoredConversation, stored_form
from tgi_asgi.api.openai.pages import list_body, page_of
from tgi_asgi.api.openai.response_input import (
    MANY_REFERENCES,
    ItemPaths,
    decode_items,
    read_items,
    resolve_references,
)
from tgi_asgi.api.openai.response_schema import ConversationRequest, ConversationUpdate, Item, NewItems
from tgi_asgi.api.openai.response_store import MAX_BYTES
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.errors import NotFound

_CREATE = msgspec.json.Decoder(ConversationRequest)
_UPDATE = msgspec.json.Decoder(ConversationUpdate)
_PATHS = ItemPaths(given="items")
_ITEMS = msgspec.json.Decoder(NewItems)


async def create(exchange: Exchange) -> None:
    """Make a conversation, which may have items from the start."""
    store = _store(exchange)
    request = await exchange.read_json(_CREATE)
    items = await _stored_items(request.items or [], exchange)
    conversation = StoredConversation(
        f"conv_{secrets.token_hex(24)}", int(time.time()), request.metadata or {}, items
    )
    if not store.add(conversation, exchange.tenant):
        _refuse_size()
    await exchange.respond_json(_described(conversation))


async def retrieve(exchange: Exchange) -> None:
    """Answer with a conversation, without its items."""
    await exchange.respond_json(_described(_named(exchange)))


async def update(exchange: Exchange) -> None:
    """Replace a conversation's metadata."""
    request = await exchange.read_json(_UPDATE)
    conversation = _named(exchange)
    exchange.context.conversations.describe(conversation, request.metadata or {})
    await exchange.respond_json(_described(conversation))


async def delete(exchange: Exchange) -> None:
    """Delete a conversation; the responses that were made in it stay."""
    conversation = _named(exchange)
    exchange.context.conversations.delete(conversation.id, exchange.tenant)
    await exchange.respond_json({"id": conversation.id, "object": "conversation.deleted", "deleted": True})


async def add_items(exchange: Exchange) -> None:
    """Add items at a conversation's end."""
    request = await exchange.read_json(_ITEMS)
    conversation, store = _named(exchange), exchange.context.conversations
    items = await _stored_items(request.items, exchange)
    added = await exchange.work(store.append, conversation, items)
    if added is None:
        _refuse_size()
    await exchange.respond(200, await exchange.work(_list, [*added.values()], has_more=False))


async def list_items(exchange: Exchange) -> None:
    """Answer with a page of a conversation's items."""
    items = exchange.context.conversations.items_of(_named(exchange))
    indices, has_more = page_of([*items], exchange.scope["query_string"])
    stored = [*items.values()]
    page = [stored[i] for i in indices]
    exchange.is_large |= sum(map(len, page)) > LARGE_BODY
    await exchange.respond(200, await exchange.work(_list, page, has_more))


async def retrieve_item(exchange: Exchange) -> None:
    """Answer with one item."""
    items = exchange.context.conversations.items_of(_named(exchange))
    item_id = exchange.scope["path_params"]["item"]
    if item_id not in items:
        _miss_item(item_id)
    await exchange.respond(200, items[item_id][1:-1])  # a list of one, without blanks


async def delete_item(exchange: Exchange) -> None:
    """Delete one item; answer with the conversation."""
    conversation, item_id = _named(exchange), exchange.scope["path_params"]["item"]
    if not exchange.context.conversations.drop_item(conversation, item_id):
        _miss_item(item_id)
    await exchange.respond_json(_described(conversation))


def find_conversation(
    exchange: Exchange, conversation_id: str, param: str = "conversation"
) -> StoredConversation:
    """Return the client's conversation with this id.

    Raises:
        NotFound: if there is none.
    """
    found = exchange.context.conversations.find(conversation_id, exchange.tenant)
    if found is None:
        message = f"Conversation with id '{conversation_id[:80]}' not found."
        raise NotFound(message, param=param, code="conversation_not_found")
    return found


async def _stored_items(given: list[Item], exchange: Exchange) -> dict[str, bytes]:
    """Return a request's items as they are stored; they are checked as those of a response's input.

    Raises:
        InvalidRequest: if an item could not be continued, or those that references name are too large.
    """
    find = partial(exchange.context.responses.find_item, tenant=exchange.tenant)
    found = await exchange.work(resolve_references, given, find, _PATHS)
    size = sum(map(len, found.values()))
    if size > MAX_BYTES:  # 400,000 references to one item fit into a body
        _refuse_size()
    exchange.is_large |= size > LARGE_BODY or len(found) > MANY_REFERENCES
    return await exchange.work(_read, given, found, exchange)


def _read(given: Sequence[Item], found: Mapping[int, bytes], exchange: Exchange) -> dict[str, bytes]:
    items = [decode_items([found[i]])[0] if i in found else item for i, item in enumerate(given)]
    read_items(items, images=exchange.context.ready().new_images(), paths=_PATHS)
    return stored_form(items)


def _list(stored: Sequence[bytes], has_more: bool) -> bytes:
    return list_body(decode_items(stored), has_more)


def _described(conversation: StoredConversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_at,
        "metadata": conversation.metadata,
    }


def _named(exchange: Exchange) -> StoredConversation:
    """Return the conversation that the request's path names."""
    _store(exchange)
    return find_conversation(exchange, exchange.scope["path_params"]["conversation"], "id")


def _store(exchange: Exchange) -> ConversationStore:
    store = exchange.context.conversations
    if not store.is_on:
        raise NotFound(
            f"Unknown URL: {exchange.method} {exchange.path}: this server stores nothing (--response-store 0)"
        )
    return store


def _miss_item(item_id: str) -> NoReturn:
    raise NotFound(f"Item with id '{item_id[:80]}' not found.", param="item_id", code="item_not_found")


def _refuse_size() -> NoReturn:
    refuse_field("items", "would make the conversation larger than this server stores")
