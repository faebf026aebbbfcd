"""What `/v1/responses` reads, and the chat request that it amounts to.

The stateless subset: whatever would need stored conversations or hosted tools is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Struct

from tgi_asgi.http.openai_params import refuse
from tgi_asgi.http.openai_schema import (
    CalledFunction,
    ChatRequest,
    ContentPart,
    FunctionDefinition,
    JsonSchemaFormat,
    Message,
    Positive,
    ResponseFormat,
    Tool,
    ToolCall,
    range_of,
)

_STATEFUL = ("previous_response_id", "conversation", "prompt", "background")
_LOGPROBS = "message.output_text.logprobs"
_ROLES = ("assistant", "developer", "system", "user")
_TEXT_PARTS = ("input_text", "output_text", "text")


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


class FlatTool(Struct):
    """A function, without the nesting of chat completions."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesRequest(Struct, kw_only=True):
    """The body of `POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, range_of(minimum=0, maximum=2)] | None = None
    top_p: Annotated[float, range_of(minimum=0, maximum=1)] | None = None
    top_logprobs: Annotated[int, range_of(minimum=0, maximum=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None


RESPONSES_DECODER = msgspec.json.Decoder(ResponsesRequest)


def to_chat(request: ResponsesRequest) -> ChatRequest:
    """Return the chat request with the same meaning.

    Raises:
        InvalidRequest: an item or a field is refused; `param` names it.
    """
    for name in _STATEFUL:
        if getattr(request, name) not in (None, False):
            refuse(name, f"`{name}` is not supported: this server keeps no state", "unsupported_parameter")
    wants_logprobs = _LOGPROBS in (request.include or ())
    return ChatRequest(
        messages=_messages(request),
        model=request.model,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        logprobs=wants_logprobs,
        top_logprobs=request.top_logprobs if wants_logprobs else None,
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        response_format=_format(request.text.format if request.text is not None else None),
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())],
        tool_choice=request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls,
        chat_template_kwargs=request.chat_template_kwargs,
        add_generation_prompt=True,  # a last message of the assistant is history, not a beginning
    )


def _messages(request: ResponsesRequest) -> list[Message]:
    messages: list[Message] = []
    if request.instructions:
        messages.append(Message("system", request.instructions))
    if isinstance(request.input, str):
        return [*messages, Message("user", request.input)]
    reasoning: str | None = None
    for i, item in enumerate(request.input):
        path = f"input[{i}]"
        kind = item.get("type") or "message"
        if kind == "reasoning":
            reasoning = _texts(item.get("content") or [], f"{path}.content", ("reasoning_text",))
        elif kind == "function_call":
            if not messages or messages[-1].role != "assistant":
                messages.append(Message("assistant", reasoning_content=reasoning))
                reasoning = None
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), _call(item, path)]
        elif kind == "function_call_output":
            output = _content(item.get("output"), f"{path}.output")
            messages.append(Message("tool", output, tool_call_id=_string(item, "call_id", path)))
        elif kind == "message":
            role = _string(item, "role", path)
            if role not in _ROLES:
                refuse(f"{path}.role", f"`{path}.role` must be one of {', '.join(_ROLES)}, got {role[:40]!r}")
            message = Message(role, _content(item.get("content"), f"{path}.content"))
            if role == "assistant":
                message.reasoning_content, reasoning = reasoning, None
            messages.append(message)
        else:
            refuse(f"{path}.type", f"`{path}.type` {str(kind)[:40]!r} is not supported", "invalid_value")
    return messages


def _call(item: dict[str, Any], path: str) -> ToolCall:
    function = CalledFunction(_string(item, "name", path), _string(item, "arguments", path))
    return ToolCall(function, id=_string(item, "call_id", path))


def _content(content: Any, path: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(path, f"`{path}` must be a string or a list of parts")
    return [ContentPart("text", text) for text in _parts(content, path, _TEXT_PARTS)]


def _texts(content: Any, path: str, types: Sequence[str]) -> str:
    return content if isinstance(content, str) else "\n".join(_parts(content, path, types))


def _parts(content: Any, path: str, types: Sequence[str]) -> list[str]:
    if not isinstance(content, list):
        refuse(path, f"`{path}` must be a list of parts")
    texts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*types, "refusal") or not isinstance(text, str):
            where = f"{path}[{j}].type"
            refuse(where, f"`{where}` must be one of {', '.join(types)}, with a `text`", "invalid_value")
        texts.append(text)
    return texts


def _string(item: dict[str, Any], name: str, path: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        refuse(f"{path}.{name}", f"`{path}.{name}` must be a string")
    return value


def _tool(tool: FlatTool, path: str) -> Tool:
    if tool.type != "function":
        refuse(
            f"{path}.type",
            f"`{path}.type` must be `function`: no tools are hosted here",
            "unsupported_parameter",
        )
    if tool.name is None:
        refuse(f"{path}.name", f"`{path}.name` is required")
    return Tool("function", FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))


def _format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    if given.type not in ("text", "json_object", "json_schema"):
        refuse("text.format.type", "`text.format.type` must be text, json_object or json_schema")
    if given.type != "json_schema":
        return ResponseFormat(given.type)
    if given.schema is None:
        refuse("text.format.schema", "`text.format.schema` is required with type `json_schema`")
    return ResponseFormat(given.type, JsonSchemaFormat(given.schema, given.name, given.strict))
