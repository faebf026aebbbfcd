"""The tools of a request: their names, which of them may be called, and whether one must be."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tgi_asgi.api.call import ToolChoice
from tgi_asgi.api.limits import MAX_TOOLS
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.tools import ToolSpec

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
CUSTOM_INPUT = "input"  # what the one parameter of a custom tool is called
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
        index: its place in the client's list, of which hosted tools are skipped.
        is_strict: its parameters are enforced to the letter, or refused.
        is_custom: it takes one string, not JSON; the model calls it with that as `input`.
        namespace: what the client groups it under; goes back with its calls.
    """

    index: int
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    is_strict: bool | None = None
    is_custom: bool = False
    namespace: str | None = None

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
        """Return a tool of one string; a grammar for it is told to the model, and not enforced."""
        if grammar is not None:
            description = f"{description or ''}\nThe input must match this grammar:\n{grammar}".strip()
        return cls(index, name, description, _CUSTOM_PARAMETERS, is_custom=True, namespace=namespace)

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates take it."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        function: dict[str, Any] = {key: value for key, value in told.items() if value is not None}
        if self.is_strict is not None:
            function["strict"] = self.is_strict
        return {"type": "function", "function": function}


def check_tools(tools: Sequence[Tool]) -> None:
    """Check the names.

    Raises:
        InvalidRequest: one is no name, or given twice; or they are too many.
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
    """Return what the model may call; None where that is nothing.

    Args:
        mode: none, auto, required, or named.
        names: what it is limited to, if it is.

    Raises:
        InvalidRequest: a tool that is named is not there.
    """
    if not tools:
        if mode in ("required", "named"):
            raise InvalidRequest("`{field}` is only allowed with `tools`", field=("tool_choice",))
        return None
    if mode == "none":
        return None
    known = {tool.name for tool in tools}
    for name in names or ():
        if name not in known:
            message = f"`{{field}}` names {name[:80]!r}, which is not among `tools`"
            raise InvalidRequest(message, field=("tool_choice",))
    specs = [
        ToolSpec(tool.name, tool.parameters, is_strict=bool(tool.is_strict))
        for tool in tools
        if names is None or tool.name in names
    ]
    is_named = mode == "named"
    return ToolChoice(specs, is_named or mode == "required", is_named, is_parallel and not is_named)


def whole_arguments(text: str) -> Any:
    """Return a call's arguments; None where `max_tokens` has cut them: half a call is none."""
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(text)


def note_skipped(kinds: Sequence[str]) -> None:
    """Log that a request offered tools that are not ours to run; the model never hears of them."""
    if kinds:
        logger.info("tools skipped: %s", ", ".join(sorted({str(kind)[:40] for kind in kinds}))[:200])
