"""The tools of a request to `/v1/responses`: those listed, and those that its items add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tgi_asgi.api.openai.client_tools import client_tool
from tgi_asgi.api.openai.response_schema import Item, ResponsesRequest
from tgi_asgi.api.openai.tool_search import found_in
from tgi_asgi.api.openai.tools import grammar_of
from tgi_asgi.api.parse import refuse_field, string_of
from tgi_asgi.api.tools import Tool, check_tools, distinct, note_skipped


def read_tools(request: ResponsesRequest, items: Sequence[Item] = ()) -> list[Tool]:
    """Return the functions that the model is shown: the request's, and those that items add.

    Args:
        items: The whole conversation.

    Raises:
        InvalidRequest: if one has the wrong form, or two have the same name.
    """
    skipped: list[str] = []
    tools = [tool for i, given in enumerate(request.tools or ()) for tool in tools_of(given, i, skipped)]
    listed = {(tool.namespace, tool.name) for tool in tools}
    added: dict[tuple[str | None, str], Tool] = {}  # several searches may find the same tool
    for given in _added_tools(items):
        for tool in tools_of(given, len(tools) + len(added), skipped):
            added[tool.namespace, tool.name] = tool
    tools += [tool for key, tool in added.items() if key not in listed]
    tools = distinct(tools)
    check_tools(tools)
    note_skipped(skipped)
    deferred = _deferred(request.tools or ())
    return [
        replace(tool, namespace=tool.name) if tool.namespace is None and tool.name in deferred else tool
        for tool in tools
    ]


def _deferred(listed: Sequence[Any]) -> set[str]:
    """Return the functions that OpenAI's own search would find, each of which is a namespace there.

    Its API gives calls of such a function the function's name as `namespace`, too, and OpenAI's agents SDK
    knows no deferred function of a call without it.
    """
    if not any(given["type"] == "tool_search" and client_tool(given) is None for given in listed):
        return set()
    return {
        given["name"]
        for given in listed
        if given["type"] == "function" and given.get("defer_loading") is True
    }


def _added_tools(items: Sequence[Item]) -> Iterator[Any]:
    """Yield the tools that items add to those of the request."""
    for item in items:
        if item.get("type") == "additional_tools" and isinstance(item.get("tools"), list):
            yield from item["tools"]
        yield from found_in(item)


def tools_of(given: Any, index: int, skipped: list[str], namespace: str | None = None) -> Iterator[Tool]:
    """Yield an entry's tools: none for a hosted tool, several for a namespace."""
    path = f"tools[{index}]"
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        refuse_field(f"{path}.type", "is required")
    kind, inner = given["type"], given.get("tools")
    if kind == "namespace" and isinstance(inner, list):
        for each in inner:
            yield from tools_of(each, index, skipped, string_of(given, "name", path))
        return
    if (own := client_tool(given)) is not None:
        yield own.tool(index, given)
        return
    if kind not in ("function", "custom"):
        skipped.append(kind)
        return
    name, description = string_of(given, "name", path), given.get("description")
    description = description if isinstance(description, str) else None
    if kind == "custom":
        yield Tool.custom(index, name, description, grammar_of(given.get("format")), namespace=namespace)
        return
    parameters, is_strict = given.get("parameters"), given.get("strict")
    if not isinstance(parameters, dict | None):
        refuse_field(f"{path}.parameters", "must be an object")
    if not isinstance(is_strict, bool | None):
        refuse_field(f"{path}.strict", "must be true or false")
    yield Tool(index, name, description, parameters, is_strict, namespace=namespace)
