"""What `/v1/responses` reads: its items to messages, its tools to functions.

What would change what the answer is (hosted conversations, prompts, background work) is refused by name;
tools and items that only offer or carry more than can be used are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Struct

from tgi_asgi.api.openai.tools import grammar_of
from tgi_asgi.api.parse import Fraction, Positive, kind_of, range_of, refuse, string_of
from tgi_asgi.api.tools import CUSTOM_INPUT, Tool, check_tools, note_skipped

Item = dict[str, Any]

_ROLES = ("assistant", "developer", "system", "user")
_TEXTS = ("input_text", "output_text", "text", "refusal")
_HOSTED = ("_call", "_output", "_list_tools", "compaction")  # ends of the names of what others have done
_IMAGE_OMITTED = "[image omitted]"


class ReasoningOptions(Struct):
    """How much the model should think."""

    effort: str | None = None
    summary: str | None = None  # accepted: the reasoning itself is shown


class TextFormat(Struct):
    """What the answer's text must match."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """How the answer's text is written."""

    format: TextFormat | None = None


class ResponsesRequest(Struct, kw_only=True):
    """The body of `POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, range_of(minimum=0, maximum=2)] | None = None
    top_p: Fraction | None = None
    top_logprobs: Annotated[int, range_of(minimum=0, maximum=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None


DECODER = msgspec.json.Decoder(ResponsesRequest)


def read_items(items: Sequence[Item], find: Callable[[str], Item | None]) -> list[dict[str, Any]]:
    """Return items as messages.

    Args:
        find: returns a stored item by its id.

    Raises:
        InvalidRequest: an item is refused; `param` names it.
    """
    messages: list[dict[str, Any]] = []
    reasoning: str | None = None
    skipped = []
    for i, item in enumerate(items):
        path = f"input[{i}]"
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        if kind == "item_reference":
            found = find(string_of(item, "id", path))
            if found is None:
                refuse(f"{path}.id", f"`{path}.id`: no such item is stored", "item_not_found")
            item, kind = found, found["type"]
        match kind:
            case "reasoning":
                reasoning = _joined(item.get("content") or [], f"{path}.content", ("reasoning_text",))
            case "function_call" | "custom_tool_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append(_assistant(None, reasoning))
                    reasoning = None
                messages[-1].setdefault("tool_calls", []).append(_call(item, kind, path))
            case "function_call_output" | "custom_tool_call_output":
                output = _content(item.get("output"), f"{path}.output", images_omitted=True)
                call_id = string_of(item, "call_id", path)
                messages.append({"role": "tool", "content": output, "tool_call_id": call_id})
            case "message":
                role = string_of(item, "role", path)
                if role not in _ROLES:
                    where = f"{path}.role"
                    refuse(where, f"`{where}` must be one of {', '.join(_ROLES)}, got {role[:40]!r}")
                content = _content(item.get("content"), f"{path}.content")
                if role == "assistant":
                    messages.append(_assistant(content, reasoning))
                    reasoning = None
                else:
                    messages.append({"role": role, "content": content})
            case str() if kind == "additional_tools" or kind.endswith(
                ("_call", "_output", "_list_tools", "compaction")
            ):
                skipped.append(kind)
            case _:
                refuse(f"{path}.type", f"`{path}.type` {str(kind)[:40]!r} is not supported", "invalid_value")
    note_skipped(skipped)
    return messages


def read_tools(request: ResponsesRequest) -> list[Tool]:
    """Return the functions that the model is told of, those that items bring along included.

    Raises:
        InvalidRequest: one is of the wrong shape, or two have one name.
    """
    tools: list[Tool] = []
    skipped: list[str] = []
    for i, given in enumerate(request.tools or ()):
        _read_tool(given, i, tools, skipped)
    items = request.input if isinstance(request.input, list) else []
    for item in items:
        if item.get("type") == "additional_tools" and isinstance(item.get("tools"), list):
            for given in item["tools"]:
                _read_tool(given, len(tools), tools, skipped)
    check_tools(tools)
    note_skipped(skipped)
    return tools


def _read_tool(
    given: Any, index: int, tools: list[Tool], skipped: list[str], namespace: str | None = None
) -> None:
    path = f"tools[{index}]"
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        refuse(f"{path}.type", f"`{path}.type` is required")
    kind = given["type"]
    inner = given.get("tools")
    if kind == "namespace" and isinstance(inner, list):
        for each in inner:
            _read_tool(each, index, tools, skipped, string_of(given, "name", path))
        return
    if kind not in ("function", "custom"):
        skipped.append(kind)
        return
    name = string_of(given, "name", path)
    described = given.get("description")
    description = described if isinstance(described, str) else None
    if kind == "custom":
        form = given.get("format")
        grammar = grammar_of(form if isinstance(form, dict) else None)
        tools.append(Tool.custom(index, name, description, grammar, namespace=namespace))
        return
    parameters = given.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        refuse(f"{path}.parameters", f"`{path}.parameters` must be an object")
    is_strict = given.get("strict")
    if is_strict is not None and not isinstance(is_strict, bool):
        refuse(f"{path}.strict", f"`{path}.strict` must be true or false")
    tools.append(Tool(index, name, description, parameters, is_strict, namespace=namespace))


def _assistant(content: Any, reasoning: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def _call(item: Item, kind: str, path: str) -> dict[str, Any]:
    if kind == "custom_tool_call":
        arguments: Any = {CUSTOM_INPUT: string_of(item, "input", path)}
    else:
        arguments = string_of(item, "arguments", path)
    function = {"name": string_of(item, "name", path), "arguments": arguments}
    return {"id": string_of(item, "call_id", path), "type": "function", "function": function}


def _content(content: Any, path: str, *, images_omitted: bool = False) -> str | list[str]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(path, f"`{path}` must be a string or a list of parts")
    kinds = (*_TEXTS, "input_image", "input_file") if images_omitted else _TEXTS
    return _parts(content, path, kinds)


def _joined(content: Any, path: str, kinds: Sequence[str]) -> str:
    return content if isinstance(content, str) else "\n".join(_parts(content, path, kinds))


def _parts(content: Any, path: str, kinds: Sequence[str]) -> list[str]:
    if not isinstance(content, list):
        refuse(path, f"`{path}` must be a list of parts")
    texts = []
    for j, part in enumerate(content):
        where = f"{path}[{j}]"
        kind = kind_of(part, where, kinds)
        if kind in ("input_image", "input_file"):
            texts.append(_IMAGE_OMITTED)
        else:
            texts.append(string_of(part, "refusal" if kind == "refusal" else "text", where))
    return texts
