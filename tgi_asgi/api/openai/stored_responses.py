"""The routes below `/v1/responses` that read or delete a stored answer."""

from __future__ import annotations

from tgi_asgi.api.exchange import LARGE_BODY, Exchange
from tgi_asgi.api.openai.pages import list_body, listed, page_of, query_of
from tgi_asgi.api.openai.response_input import decode_items
from tgi_asgi.api.openai.response_store import StoredResponse
from tgi_asgi.api.parse import refuse, refuse_field
from tgi_asgi.errors import NotFound


async def retrieve(exchange: Exchange) -> None:
    """Answer with a stored response."""
    stored = _stored(exchange)
    if query_of(exchange.scope["query_string"]).get("stream") == "true":
        refuse_field("stream", "is not supported: the events of a stored response are not kept")
    await exchange.respond(200, stored.body)


async def cancel(exchange: Exchange) -> None:
    """Refuse to cancel: a stored response is finished, because none runs in the background."""
    stored = _stored(exchange)
    refuse("id", f"Response with id '{stored.id}' is finished; only background responses can be cancelled")


async def list_input(exchange: Exchange) -> None:
    """Answer with a page of a stored response's input items, including those of earlier responses."""
    stored = _stored(exchange)
    exchange.is_large |= sum(map(len, stored.history)) > LARGE_BODY
    await exchange.respond(200, await exchange.work(_page, stored, exchange.scope["query_string"]))


def _page(stored: StoredResponse, query_string: bytes) -> bytes:
    """Return the items that a query asks for."""
    history = stored.history[: len(stored.history) - len(stored.items)]
    owner = stored.id.removeprefix("resp_")
    items = [listed(item, owner, i) for i, item in enumerate(decode_items(history))]
    indices, has_more = page_of([item["id"] for item in items], query_string)
    return list_body([items[i] for i in indices], has_more)


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
