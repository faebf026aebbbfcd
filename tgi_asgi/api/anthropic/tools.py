"""The tools of Anthropic's requests: those listed, and those that a conversation adds and removes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from tgi_asgi.api.anthropic.schema import ClientTool, Turn
from tgi_asgi.api.anthropic.typed_tools import definition_of
from tgi_asgi.api.parse import refuse, refuse_field, string_of
from tgi_asgi.api.tools import Tool, check_tools, note_skipped

CHANGES = ("tool_addition", "tool_removal")  # blocks of system turns


def read_tools(entries: Sequence[ClientTool] | None, turns: Sequence[Turn]) -> list[Tool]:
    """Return the tools that the model is shown: those listed, with the changes that system turns make.

    Raises:
        InvalidRequest: if two have the same name, or a name is missing or invalid.
    """
    tools, skipped = [], []
    for i, tool in enumerate(entries or ()):
        if is_hosted(tool):
            skipped.append(str(tool.type))
        else:
            tools.append(_tool(tool, i, f"tools[{i}]"))
    check_tools(tools)
    note_skipped(skipped)
    changed = _changed_tools(tools, turns)
    check_tools(changed)
    return changed


def is_hosted(tool: ClientTool) -> bool:
    """Return whether the model is not shown a tool, because it runs elsewhere."""
    return tool.type not in (None, "custom") and definition_of(str(tool.type)) is None


def _tool(tool: ClientTool, index: int, path: str) -> Tool:
    if tool.name is None:
        refuse_field(f"{path}.name", "is required")
    published = None if tool.type is None else definition_of(tool.type)
    if published is not None:
        return Tool(index, tool.name, *published, tool.strict)
    return Tool(index, tool.name, tool.description, tool.input_schema, tool.strict)


def _changed_tools(tools: list[Tool], turns: Sequence[Turn]) -> list[Tool]:
    """Return the tools after the `tool_addition` and `tool_removal` blocks of system turns.

    A block names a listed tool or has a definition; one of a hosted tool changes nothing.
    """
    known = {tool.name: tool for tool in tools}
    offered = dict(known)
    for path, is_removal, change in _changes(turns):
        kind = change.get("type")
        if kind == "tool_definition" and not is_removal:
            tool = _defined_tool(change.get("definition"), len(known), f"{path}.definition")
            if tool is not None:
                known[tool.name] = offered[tool.name] = tool
        elif kind == "tool_reference":
            name = string_of(change, "name", path)
            if is_removal:
                offered.pop(name, None)
            elif name in known:
                offered[name] = known[name]
    return [*offered.values()]


def _changes(turns: Sequence[Turn]) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Yield each change of tools: the path of its tool, whether that is removed, and what it says of it."""
    for i, turn in enumerate(turns):
        if turn.role != "system" or isinstance(turn.content, str):
            continue
        for j, block in enumerate(turn.content or ()):
            if block.get("type") in CHANGES:
                path, change = f"messages[{i}].content[{j}].tool", block.get("tool")
                if not isinstance(change, dict):
                    refuse_field(path, "must be an object")
                yield path, block["type"] == "tool_removal", change


def _defined_tool(definition: Any, index: int, path: str) -> Tool | None:
    """Return a tool that a block defines, or None if it is hosted."""
    try:
        given = msgspec.convert(definition, ClientTool)
    except msgspec.ValidationError as error:
        refuse(path, f"`{path}`: {error}")
    if is_hosted(given):
        note_skipped([str(given.type)])
        return None
    return _tool(given, index, path)
