"""Tools of a chat request: their shapes, which of them may be called, and whether one must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.errors import ToolError
from tgi_asgi.http.openai_params import refuse
from tgi_asgi.http.openai_schema import ChatRequest, Tool
from tgi_asgi.text.tools import ToolSpec

_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request lets the model call; there is none where nothing may be called."""

    specs: Sequence[ToolSpec]
    must_call: bool
    is_named: bool  # the client chose the function: OpenAI then says that the answer just stopped
    is_parallel: bool


def tool_plan(request: ChatRequest, *, is_compat: bool) -> ToolPlan | None:
    """Check tools and what goes with them; return None where no call can be made.

    Raises:
        InvalidRequest: a shape is wrong, or an unknown function is named.
        ToolError: in TGI's words, what only its compatible mode refuses so.
    """
    tools = request.tools
    if is_compat and tools is not None and request.response_format is not None:
        raise ToolError("Grammar and tools are mutually exclusive", param="tools")
    _check_tools(tools or ())
    _check_unsupported(request)
    choice = request.tool_choice
    if not tools:
        if choice not in (None, "none", "auto") and not is_compat:
            refuse("tool_choice", "`tool_choice` is only allowed with `tools`")
        return None
    mode, names = _choice(choice)
    if mode == "none":
        return None
    for name in names or ():
        if all(name != _name(tool) for tool in tools):
            if is_compat:
                raise ToolError(f"Tool with name {name} not found", param="tool_choice")
            refuse("tool_choice", f"`tool_choice` names {name[:80]!r}, which is not among `tools`")
    is_named = mode == "named"
    must_call = is_named or mode == "required"
    specs = [
        ToolSpec(function.name, function.parameters, is_strict=must_call or bool(function.strict))
        for tool in tools
        if (function := tool.function) is not None and (names is None or function.name in names)
    ]
    is_parallel = not (is_named or is_compat or request.parallel_tool_calls is False)
    return ToolPlan(specs, must_call, is_named, is_parallel)


def _choice(choice: str | dict[str, Any] | None) -> tuple[str, list[str] | None]:
    """Return the mode (none, auto, required, named) and the functions it is limited to, if it is."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str):  # TGI takes any other string for a function's name
        return (choice, None) if choice in _MODES else ("named", [choice])
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)  # flat in the Responses API
        mode = allowed.get("mode") if isinstance(allowed, dict) else None
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
            refuse(
                "tool_choice.allowed_tools",
                "`tool_choice.allowed_tools` must have `mode` (auto or required) and a list `tools`",
            )
        return mode, [
            _named(tool, f"tool_choice.allowed_tools.tools[{index}]") for index, tool in enumerate(tools)
        ]
    return "named", [_named(choice, "tool_choice")]


def _named(value: Any, path: str) -> str:
    """Return the name in `{"type": "function", "function": {"name": ...}}`, or in its flat form."""
    if isinstance(value, dict) and value.get("type", "function") == "function":
        function = value.get("function", value)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return name
    refuse(path, f'`{path}` must be `{{"type": "function", "function": {{"name": ...}}}}`')


def _check_tools(tools: Sequence[Tool]) -> None:
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.type != "function" or tool.function is None:
            refuse(f"tools[{i}].type", f"`tools[{i}].type` must be `function` with a `function`")
        name = tool.function.name
        if not _is_name(name):
            refuse(
                f"tools[{i}].function.name",
                f"`tools[{i}].function.name` must have 1 to 64 letters, digits, `_` or `-`",
            )
        if name in names:
            refuse(f"tools[{i}].function.name", f"`tools[{i}].function.name` is given twice")
        names.add(name)


def _check_unsupported(request: ChatRequest) -> None:
    for name in ("functions", "function_call"):
        if getattr(request, name) not in (None, [], "none"):
            refuse(
                name, f"`{name}` is not supported; OpenAI has replaced it by `tools`", "unsupported_parameter"
            )
    if any(modality != "text" for modality in request.modalities or ()):
        refuse("modalities", "`modalities` may hold `text` only", "unsupported_parameter")
    if request.audio is not None:
        refuse("audio", "`audio` is not supported", "unsupported_parameter")


def _name(tool: Tool) -> str | None:
    return tool.function.name if tool.function is not None else None


def _is_name(name: str) -> bool:
    return 1 <= len(name) <= 64 and name.isascii() and name.replace("-", "_").replace("_", "a").isalnum()
