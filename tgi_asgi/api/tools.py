"""The tools of a request: their names, which ones may be called, and whether one must be."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from tgi_asgi.api.job import ToolChoice
from tgi_asgi.api.limits import MAX_TOOLS
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.chat.message import ChatTool
from tgi_asgi.text.surrogates import parsed
from tgi_asgi.text.tools import ToolSpec, with_json_types

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
CUSTOM_INPUT = "input"  # name of a custom tool's only parameter
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string"}},
    "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call, as a client describes it.

    Attributes:
        index: Index in the client's list, in which hosted tools are skipped.
        is_strict: Whether its parameters are enforced exactly, or the request refused.
        is_custom: Whether it takes one string instead of JSON; the model passes it as `input`.
        namespace: Group that the client put it in; returned with its calls.
        own_name: The client's name for it, if the model is shown another one.
        own_type: OpenAI's type of it, if the client gave that instead of a schema.
    """

    index: int
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    is_strict: bool | None = None
    is_custom: bool = False
    namespace: str | None = None
    own_name: str | None = None
    own_type: str | None = None

    @classmethod
    def custom(
        cls,
        index: int,
        name: str,
        description: str | None,
        grammar: str | None = None,
        *,
        namespace: str | None = None,
    ) -> Tool:
        """Return a tool with one string parameter; its grammar is shown to the model, but not enforced."""
        if grammar is not None:
            description = f"{description or ''}\nThe input must match this grammar:\n{grammar}".strip()
        return cls(index, name, description, _CUSTOM_PARAMETERS, is_custom=True, namespace=namespace)

    def for_template(self) -> ChatTool:
        """Return it in the form that chat templates expect."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        function: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
        if self.is_strict is not None:
            function["strict"] = self.is_strict
        return {"type": "function", "function": function}


def distinct(tools: Sequence[Tool]) -> list[Tool]:
    """Return the tools with different names: those of namespaces get the namespace's name in front.

    OpenAI's own types of tools are in a namespace, too: its API takes a `shell` beside a function `shell`.
    Only names that several tools have change, so that most tools keep the name that their texts mention.
    """
    counts = Counter(tool.name for tool in tools)
    return [
        replace(tool, name=f"{namespace.rstrip('_')}__{tool.name}", own_name=tool.name)
        if (namespace := tool.namespace or (tool.own_type and "builtin")) and counts[tool.name] > 1
        else tool
        for tool in tools
    ]


def check_tools(tools: Sequence[Tool]) -> None:
    """Check the tools' names.

    Raises:
        InvalidRequest: if a name is invalid or given twice, or there are too many tools.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"`{{field}}` takes at most {MAX_TOOLS} tools", field=("tools",))
    names: set[str] = set()
    for tool in tools:
        rule = "is given twice" if tool.name in names else None
        if not _NAME.fullmatch(tool.name):
            rule = "must have 1 to 128 letters, digits, `_` or `-`"
        if rule is not None:
            raise InvalidRequest(f"`{{field}}` {rule}", field=("tools", tool.index, "name"))
        names.add(tool.name)


def choose(
    tools: Sequence[Tool], mode: str, names: Sequence[str] | None = None, *, is_parallel: bool = True
) -> ToolChoice | None:
    """Return the tools that the model may call, or None if it may call none.

    Args:
        mode: none, auto, required, or named.
        names: Names of the allowed tools, if limited.

    Raises:
        InvalidRequest: if a named tool does not exist, or a strict one's arguments cannot be an object.
    """
    if not tools:
        if mode in ("required", "named") or names:
            raise InvalidRequest("`{field}` is only allowed with `tools`", field=("tool_choice",))
        return None
    if mode == "none":
        return None
    known = {tool.name for tool in tools}
    for name in names or ():
        if name not in known:
            message = f"`{{field}}` names {name[:80]!r}, which is not among the tools"
            raise InvalidRequest(message, field=("tool_choice",))
    wanted = known.intersection(names) if names is not None else known
    specs = [_spec(tool) for tool in tools if tool.name in wanted]
    is_named = mode == "named"
    return ToolChoice(specs, is_named or mode == "required", is_named, is_parallel and not is_named)


def _spec(tool: Tool) -> ToolSpec:
    if tool.is_strict:
        if not _may_be_object(tool.parameters):
            rule = "must have type `object`: a call's arguments are one"
            raise InvalidRequest(f"`{{field}}` {rule}", field=("tools", tool.index, "parameters"))
        return ToolSpec(tool.name, tool.parameters)
    parameters = with_json_types(tool.parameters)
    return ToolSpec(tool.name, parameters, is_strict=False, is_free=not _may_be_object(parameters))


def _may_be_object(schema: Mapping[str, Any] | None) -> bool:
    """Return whether a schema's own type allows objects."""
    kinds = (schema or {}).get("type", "object")
    return "object" in kinds if isinstance(kinds, list) else bool(kinds == "object")


def whole_arguments(text: str) -> Any:
    """Return a call's parsed arguments, or None if `max_tokens` cut them off.

    A model may escape half of a surrogate pair, which no answer can hold; U+FFFD replaces it.
    """
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(text)
    with contextlib.suppress(ValueError, RecursionError):
        return orjson.loads(json.dumps(parsed(text)))
    return None


def note_skipped(kinds: Sequence[str]) -> None:
    """Log that a request offered hosted tools, which are not shown to the model."""
    if kinds:
        logger.info("tools skipped: %s", ", ".join(sorted({str(kind)[:40] for kind in kinds}))[:200])
