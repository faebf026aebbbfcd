"""The routes below `/v1/responses` that read or delete a stored answer."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs

import msgspec

from tgi_asgi.api.exchange import LARGE_BODY, Exchange
from tgi_asgi.api.openai.response_input import decode_items
from tgi_asgi.api.openai.response_store import StoredResponse
from tgi_asgi.api.parse import refuse, refuse_field
from tgi_asgi.errors import NotFound

_MAX_PAGE = 100  # items per page, OpenAI's limit


async def retrieve(exchange: Exchange) -> None:
    """Answer with a stored response."""
    stored = _stored(exchange)
    if _query(exchange.scope["query_string"]).get("stream") == "true":
        refuse_field("stream", "is not supported: the events of a stored response are not kept")
    await exchange.respond(200, stored.body)


async def cancel(exchange: Exchange) -> None:
    """Refuse to cancel: a stored response is finished, because none runs in the background."""
    stored = _stored(exchange)
    refuse("id", f"Response with id '{stored.id}' is finished; only background responses can be cancelled")


async def compact(exchange: Exchange) -> None:
    """Refuse to compact a conversation."""
    raise NotFound(f"Unknown URL: {exchange.method} {exchange.path}: this server compacts no conversations")


async def list_input(exchange: Exchange) -> None:
    """Answer with a page of a stored response's input items, including those of earlier responses."""
    stored = _stored(exchange)
    exchange.is_large |= sum(map(len, stored.history)) > LARGE_BODY
    await exchange.respond(200, await exchange.work(_page, stored, exchange.scope["query_string"]))


def _page(stored: StoredResponse, query_string: bytes) -> bytes:
    """Return the items that a query asks for: `limit` of them, in `order`, after the one with id `after`."""
    query = _query(query_string)
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (re.fullmatch("[0-9]{1,3}", limit) and 1 <= int(limit) <= _MAX_PAGE):
        refuse_field("limit", f"must be 1 to {_MAX_PAGE}, got {limit[:40]!r}")
    if order not in ("asc", "desc"):
        refuse_field("order", f"must be asc or desc, got {order[:40]!r}")
    history = stored.history[: len(stored.history) - len(stored.items)]
    items = [_listed(item, stored.id, i) for i, item in enumerate(decode_items(history))]
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [i for i, item in enumerate(items, 1) if item["id"] == after]
        if not places:
            refuse_field("after", "names no item of the response's input")
        items = items[places[0] :]
    page = items[: int(limit)]
    first_id, last_id = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    has_more = len(items) > len(page)
    return msgspec.json.encode(  # integers may be of any size, which orjson rejects
        {"object": "list", "data": page, "first_id": first_id, "last_id": last_id, "has_more": has_more}
    )


def _query(query_string: bytes) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query_string.decode("latin-1")).items()}


async def delete(exchange: Exchange) -> None:
    """Delete a stored response."""
    stored = _stored(exchange)
    exchange.context.responses.delete(stored.id, exchange.tenant)
    await exchange.respond_json({"id": stored.id, "object": "response", "deleted": True})


def _stored(exchange: Exchange) -> StoredResponse:
    response_id = exchange.scope["path_params"]["response"]
    stored = exchange.context.responses.find(response_id, exchange.tenant)
    if stored is None:
        message = f"Response with id '{response_id[:80]}' not found."
        raise NotFound(message, param="id", code="response_not_found")
    return stored


def _listed(item: dict[str, Any], response_id: str, index: int) -> dict[str, Any]:
    """Return an input item in the form of lists: with an id, a type, a status, and content in parts."""
    kind, content = item.get("type") or "message", item.get("content")
    is_own = item.get("role") == "assistant"
    if isinstance(content, str):
        content = [{"type": "output_text" if is_own else "input_text", "text": content}]
    if is_own and isinstance(content, list):
        content = [{"annotations": [], **part} if _is_output(part) else part for part in content]
    if content is not None:
        item = {**item, "content": content}
    own_id = item.get("id") if isinstance(item.get("id"), str) else None
    prefix = "msg" if kind == "message" else "item"
    own_id = own_id or f"{prefix}_{response_id.removeprefix('resp_')}_{index}"
    return {"status": "completed", **item, "type": kind, "id": own_id}


def _is_output(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "output_text"
