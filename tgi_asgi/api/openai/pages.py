"""Pages of stored items, and the form that items have in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import msgspec

from tgi_asgi.api.parse import refuse_field

_MAX_PAGE = 100  # items per page, OpenAI's limit


def query_of(query_string: bytes) -> dict[str, str]:
    """Return a query's fields; of a repeated one, the last."""
    return {name: values[-1] for name, values in parse_qs(query_string.decode("latin-1")).items()}


def page_of(ids: Sequence[str], query_string: bytes) -> tuple[list[int], bool]:
    """Return the indices of the items that a query asks for, in its order, and whether more follow.

    It asks for `limit` of them (20), in `order` (descending), after the one with the id `after`.
    """
    query = query_of(query_string)
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (re.fullmatch("[0-9]{1,3}", limit) and 1 <= int(limit) <= _MAX_PAGE):
        refuse_field("limit", f"must be 1 to {_MAX_PAGE}, got {limit[:40]!r}")
    if order not in ("asc", "desc"):
        refuse_field("order", f"must be asc or desc, got {order[:40]!r}")
    indices = list(range(len(ids)))
    if order == "desc":
        indices.reverse()
    if after is not None:
        places = [place for place, i in enumerate(indices, 1) if ids[i] == after]
        if not places:
            refuse_field("after", "names no item of the list")
        indices = indices[places[0] :]
    return indices[: int(limit)], len(indices) > int(limit)


def list_body(items: Sequence[dict[str, Any]], has_more: bool) -> bytes:
    """Return the JSON of a list of items."""
    first_id, last_id = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return msgspec.json.encode(  # integers may be of any size, which orjson rejects
        {"object": "list", "data": items, "first_id": first_id, "last_id": last_id, "has_more": has_more}
    )


def listed(item: dict[str, Any], owner: str, index: int) -> dict[str, Any]:
    """Return an input item in the form of lists: with an id, a type, a status, and content in parts.

    Args:
        owner: Id from which, with its index, the id of an item without one is made.
    """
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
    return {"status": "completed", **item, "type": kind, "id": own_id or f"{prefix}_{owner}_{index}"}


def _is_output(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "output_text"
