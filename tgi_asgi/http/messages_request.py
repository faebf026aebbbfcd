"""What `/v1/messages` (Anthropic's API) reads, and the chat request that it amounts to."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Struct

from tgi_asgi.http.openai_params import refuse
from tgi_asgi.http.openai_schema import (
    CalledFunction,
    ChatRequest,
    FunctionDefinition,
    JsonSchemaFormat,
    Message,
    Positive,
    ResponseFormat,
    Tool,
    ToolCall,
    range_of,
)

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Turn(Struct):
    """One turn of the conversation: text, or a list of blocks."""

    role: str
    content: str | list[dict[str, Any]]


class ClientTool(Struct):
    """A function that the model may call."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None


class CountRequest(Struct, kw_only=True):
    """The body of `POST /v1/messages/count_tokens`: what makes the prompt."""

    messages: list[Turn]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """The body of `POST /v1/messages`."""

    max_tokens: Positive
    temperature: Annotated[float, range_of(minimum=0, maximum=1)] | None = None
    top_p: Annotated[float, range_of(minimum=0, maximum=1)] | None = None
    top_k: Annotated[int, range_of(minimum=0, maximum=2**63 - 1)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thread: dict[str, Any] | None = None  # a conversation that the server would keep
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None  # the older name of `output_config.format`


MESSAGES_DECODER = msgspec.json.Decoder(MessagesRequest)
COUNT_DECODER = msgspec.json.Decoder(CountRequest)


def to_chat(request: CountRequest) -> ChatRequest:
    """Return the chat request with the same meaning.

    Raises:
        InvalidRequest: a block or a field is refused; `param` names it.
    """
    messages = [Message("system", _text(request.system, "system"))] if request.system else []
    for i, turn in enumerate(request.messages):
        messages += _turn(turn, f"messages[{i}]")
    choice, is_parallel = _choice(request.tool_choice)
    chat = ChatRequest(
        messages=messages,
        model=request.model,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or ())],
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
    )
    if request.thinking is not None:
        chat.chat_template_kwargs = {"enable_thinking": request.thinking.get("type") != "disabled"}
    if isinstance(request, MessagesRequest):
        if request.thread is not None:  # with this code the SDK sends the whole history instead
            refuse(
                "thread",
                "`thread` is not supported: this server keeps no state",
                "thread_unsupported_request",
            )
        chat.response_format = _format(request)
        chat.max_completion_tokens = request.max_tokens
        chat.temperature = request.temperature
        chat.top_p = request.top_p
        chat.top_k = request.top_k
        chat.stop = request.stop_sequences
        chat.stream = request.stream
    return chat


def _format(request: MessagesRequest) -> ResponseFormat | None:
    """Return what the answer's text must match."""
    name = "output_config.format"
    given = (request.output_config or {}).get("format")
    if given is None:
        given, name = request.output_format, "output_format"
    if given is None:
        return None
    schema = given.get("schema") if isinstance(given, dict) and given.get("type") == "json_schema" else None
    if not isinstance(schema, dict):
        refuse(name, f"`{name}` must have type `json_schema` and a `schema`")
    return ResponseFormat("json_schema", JsonSchemaFormat(schema))


def _turn(turn: Turn, path: str) -> list[Message]:
    """Return a turn as messages: the results of tools are messages of their own, before the text."""
    if turn.role not in ("user", "assistant"):
        refuse(f"{path}.role", f"`{path}.role` must be user or assistant, got {turn.role[:40]!r}")
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    results: list[Message] = []
    message = Message(turn.role)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for j, block in enumerate(turn.content):
        where = f"{path}.content[{j}]"
        match turn.role, block.get("type"):
            case _, "text":
                texts.append(_string(block, "text", where))
            case "user", "tool_result":
                text = _text(block.get("content") or "", f"{where}.content")
                results.append(Message("tool", text, tool_call_id=_string(block, "tool_use_id", where)))
            case "assistant", "thinking":
                thoughts.append(_string(block, "thinking", where))
            case "assistant", "redacted_thinking":
                pass
            case "assistant", "tool_use":
                arguments = block.get("input")
                if not isinstance(arguments, dict):
                    refuse(f"{where}.input", f"`{where}.input` must be an object")
                function = CalledFunction(_string(block, "name", where), arguments)
                calls.append(ToolCall(function, id=_string(block, "id", where)))
            case _, kind:
                what = str(kind)[:40]
                refuse(f"{where}.type", f"`{where}.type` {what!r} is not supported", "invalid_value")
    message.content = "\n".join(texts) if texts else None
    message.reasoning_content = "\n".join(thoughts) if thoughts else None
    message.tool_calls = calls or None
    if turn.role == "user" and not texts:
        if not results:
            refuse(f"{path}.content", f"`{path}.content` must have at least one block")
        return results
    return [*results, message]


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(path, f"`{path}` must be a string or a list of text blocks")
    texts = []
    for j, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            where = f"{path}[{j}].type"
            refuse(where, f"`{where}` must be `text`: the model reads nothing else", "invalid_value")
        texts.append(_string(block, "text", f"{path}[{j}]"))
    return "\n".join(texts)


def _string(block: dict[str, Any], name: str, path: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        refuse(f"{path}.{name}", f"`{path}.{name}` must be a string")
    return value


def _tool(tool: ClientTool, path: str) -> Tool:
    if tool.type not in (None, "custom"):
        refuse(f"{path}.type", f"`{path}.type` must be `custom`: no tools are hosted here")
    return Tool("function", FunctionDefinition(tool.name, tool.description, tool.input_schema))


def _choice(given: dict[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool | None]:
    """Return chat's tool_choice and parallel_tool_calls."""
    if given is None:
        return None, None
    is_parallel = False if given.get("disable_parallel_tool_use") else None
    kind = given.get("type")
    if kind == "tool":
        name = _string(given, "name", "tool_choice")
        return {"type": "function", "function": {"name": name}}, is_parallel
    if kind not in _CHOICES:
        refuse("tool_choice.type", "`tool_choice.type` must be auto, any, tool or none")
    return _CHOICES[kind], is_parallel
