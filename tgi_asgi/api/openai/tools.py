"""`tools`, `tool_choice` and tools' results in the form of chat completions and responses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tgi_asgi.api.job import ToolChoice
from tgi_asgi.api.openai.schema import ToolEntry
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.api.tools import Tool, check_tools, choose, note_skipped
from tgi_asgi.errors import ToolError
from tgi_asgi.text.chat.message import ChatMessage

_MODES = ("none", "auto", "required")
_ANY = ("any", {"type": "function", "function": {"name": "any"}})  # Mistral's SDK, ChatHuggingFace
_OWN_KINDS = frozenset({"function", "custom", "namespace"})  # types of tools that the model may be shown


def read_tools(entries: Sequence[ToolEntry] | None) -> list[Tool]:
    """Return the tools of a chat that the model is shown.

    Raises:
        InvalidRequest: if one has the wrong form, or two have the same name.
    """
    tools, skipped = [], []
    for index, entry in enumerate(entries or ()):
        if entry.type == "function":
            given = entry.function
            if given is None:
                refuse_field(f"tools[{index}].function", "is required")
            tools.append(Tool(index, given.name, given.description, given.parameters, given.strict))
        elif entry.type == "custom":
            custom = entry.custom
            if custom is None:
                refuse_field(f"tools[{index}].custom", "is required")
            tools.append(Tool.custom(index, custom.name, custom.description, grammar_of(custom.format)))
        else:
            skipped.append(entry.type)
    check_tools(tools)
    note_skipped(skipped)
    return tools


def grammar_of(form: Any) -> str | None:
    """Return the grammar in a custom tool's `format`, which is nested in chats and flat in responses."""
    if not isinstance(form, dict) or form.get("type") != "grammar":
        return None
    nested = form.get("grammar")
    definition = nested.get("definition") if isinstance(nested, dict) else form.get("definition")
    return definition if isinstance(definition, str) else None


def read_choice(
    tools: Sequence[Tool],
    choice: str | dict[str, Any] | None,
    *,
    offered: Collection[str],
    is_parallel: bool,
    is_compat: bool = False,
) -> ToolChoice | None:
    """Return what `tool_choice` lets the model call; a choice of a hosted tool counts as absent.

    Args:
        offered: Types of the tools that the client sent, including hosted ones.
        is_compat: Whether an unknown tool is reported as TGI does.

    Raises:
        InvalidRequest: if its form is wrong, or it names an unknown tool.
        ToolError: instead of the latter, if `is_compat`.
    """
    typed = {tool.own_type: tool.name for tool in tools if tool.own_type is not None}
    has_hosted = not (_OWN_KINDS | typed.keys()).issuperset(offered)
    if offered and (not tools or (has_hosted and _is_hosted(choice, typed))):
        choice = None
    if choice in _ANY and all(tool.name != "any" for tool in tools):
        choice = "required"
    mode, names = _choice(choice, typed, has_hosted=has_hosted)
    if is_compat and mode == "named" and names and all(tool.name != names[0] for tool in tools):
        raise ToolError(f"Tool with name {names[0]} not found", param="tool_choice")
    return choose(tools, mode, names, is_parallel=is_parallel)


def add_call_ids(messages: list[ChatMessage]) -> None:
    """Give results of tools without an id those of the calls before them, in their order.

    Some clients send none (Qwen-Agent), OpenAI's type of outputs has them optional, and some templates show
    ids.
    """
    ids: Iterator[str | None] = iter(())
    for message in messages:
        if message["role"] == "tool":
            call_id = next(ids, None)
            if call_id is not None:
                message.setdefault("tool_call_id", call_id)
        elif "tool_calls" in message:
            ids = (call["id"] for call in message["tool_calls"])


def _is_hosted(choice: object, typed: Mapping[str, str]) -> bool:
    """Return whether a choice, or an entry of `allowed_tools`, names a hosted tool by its type."""
    kind = choice.get("type") if isinstance(choice, dict) else None
    return isinstance(kind, str) and kind not in (*_OWN_KINDS, "allowed_tools", *typed)


def _choice(
    choice: str | dict[str, Any] | None, typed: Mapping[str, str], *, has_hosted: bool
) -> tuple[str, list[str] | None]:
    """Return the mode (none, auto, required, named) and the functions that it is limited to, if any.

    Args:
        typed: Names of the tools that have a type of their own, by that.
    """
    if choice is None:
        return "auto", None
    if isinstance(choice, str):  # TGI treats any other string as a function name
        return (choice, None) if choice in _MODES else ("named", [choice])
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)  # flat in the Responses API
        allowed = allowed if isinstance(allowed, dict) else {}
        mode, tools = allowed.get("mode"), allowed.get("tools")
        if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
            rule = "must have `mode` (auto or required) and a list `tools`"
            refuse_field("tool_choice.allowed_tools", rule)
        path = "tool_choice.allowed_tools.tools"
        names = [
            _named(tool, f"{path}[{index}]", typed)
            for index, tool in enumerate(tools)
            if not (has_hosted and _is_hosted(tool, typed))
        ]
        return (mode, names) if names else ("none", None)
    return "named", [_named(choice, "tool_choice", typed)]


def _named(value: Any, path: str, typed: Mapping[str, str]) -> str:
    """Return the name in `{"type": "function", "function": {"name": ...}}`, or in its flat form."""
    kind = value.get("type", "function") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in typed:
        return typed[kind]
    if kind in ("function", "custom"):
        inner = value.get(kind, value)
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str):
            return name
    refuse_field(path, 'must be `{"type": "function", "function": {"name": ...}}`')
