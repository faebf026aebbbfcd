"""Parses requests of `/v1/responses`: items to messages, tools to functions.

Fields that would change the answer (hosted conversations, prompts, background work) are refused by name.
Tools and items that only offer or carry something unusable are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tgi_asgi.api.call import Images
from tgi_asgi.api.openai.client_tools import CALLS, OUTPUTS, client_tool
from tgi_asgi.api.openai.schema import TextRequest
from tgi_asgi.api.openai.tool_search import OUTPUT as SEARCH_OUTPUT
from tgi_asgi.api.openai.tool_search import found_in, is_client_s, result_text
from tgi_asgi.api.openai.tools import add_call_ids, grammar_of
from tgi_asgi.api.parse import (
    NO_IMAGES,
    ONLY_USERS,
    Foreign,
    Natural,
    Positive,
    Refused,
    Undocumented,
    decode_json,
    kind_of,
    range_of,
    refuse,
    refuse_field,
    string_of,
)
from tgi_asgi.api.thoughts import unsealed
from tgi_asgi.api.tools import CUSTOM_INPUT, Tool, check_tools, distinct, note_skipped

Item = dict[str, Any]

_ROLES = ("assistant", "developer", "system", "user")
_TEXTS = ("input_text", "output_text", "text", "refusal")
# Suffixes of hosted tools' item types.
_HOSTED = ("_call", "_output", "_list_tools", "_approval_request", "_approval_response", "compaction")
_OMITTED = ("input_image", "input_file")  # named in tool outputs, but not shown
_CALLS = ("function_call", "custom_tool_call", *CALLS)
_RESULTS = ("function_call_output", "custom_tool_call_output", SEARCH_OUTPUT, *OUTPUTS)


class ReasoningOptions(Struct):
    """How much the model should think."""

    effort: str | None = None
    summary: str | None = None  # whatever it asks for, the summary is the whole reasoning
    generate_summary: str | None = None  # the first name of `summary`

    def __post_init__(self) -> None:
        self.summary = self.summary or self.generate_summary


class TextFormat(Struct, omit_defaults=True):
    """Format that the answer's text must match; echoed as it was given."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None  # echoed, but not used


class ConfigurationUpdate(Struct):
    """An item that sets the format or the effort of all answers after it, up to the next such item."""

    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None


_Key = Annotated[str, Meta(max_length=64)]
_Value = Annotated[str, Meta(max_length=512)]


class ResponsesRequest(TextRequest, kw_only=True):
    """Body of `POST /v1/responses`."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    top_logprobs: Annotated[int, range_of(minimum=0, maximum=20)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[_Key, _Value], Meta(max_length=16)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None  # SGLang's name for include_reasoning
    truncation: Literal["auto", "disabled"] | None = None  # always disabled: what is too long is refused
    store: bool | None = None
    previous_response_id: str | None = None
    max_tool_calls: Natural | None = None  # of hosted tools, which are never called
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    conversation: Refused = None
    prompt: Refused = None
    background: Refused = None
    previous_response: Refused = None  # vLLM's, like the next
    previous_input_messages: Refused = None

    # Of chats and completions.
    messages: Undocumented = None
    max_tokens: Undocumented = None
    max_completion_tokens: Undocumented = None
    response_format: Undocumented = None
    reasoning_effort: Undocumented = None
    n: Undocumented = None
    best_of: Undocumented = None
    chat_template: Foreign = None
    logprobs: Foreign = None
    echo: Foreign = None
    suffix: Foreign = None
    continue_final_message: Foreign = None
    documents: Foreign = None
    functions: Foreign = None
    tool_prompt: Foreign = None
    audio: Foreign = None
    prompt_token_ids: Foreign = None
    input_ids: Foreign = None


DECODER = msgspec.json.Decoder(ResponsesRequest)
_ITEMS = msgspec.json.Decoder(list[dict[str, Any]])


def items_of(given: str | list[Item] | None) -> list[Item]:
    """Return an input as a list of items."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return given or []


def decode_items(stored: Sequence[bytes]) -> list[Item]:
    """Return the items of stored lists, one after another."""
    return [item for part in stored for item in decode_json(part, _ITEMS)]


def resolve_references(items: Sequence[Item], find: Callable[[str], bytes | None]) -> dict[int, bytes]:
    """Return the stored items that references point to, by index, as `find` returns them for an id.

    Raises:
        InvalidRequest: if there is no such item; `param` names the reference.
    """
    found = {}
    for i, item in enumerate(items):
        if _is_reference(item):
            stored = find(string_of(item, "id", f"input[{i}]"))
            if stored is None:
                refuse(f"input[{i}].id", f"`input[{i}].id`: no such item is stored", "item_not_found")
            found[i] = stored
    return found


def _is_reference(item: Item) -> bool:
    """Return whether an item only names another one, by its id; messages have no type either."""
    if item.get("type") is None:
        return "id" in item and not item.keys() & {"role", "content"}
    return bool(item["type"] == "item_reference")


def current_settings(
    request: ResponsesRequest, items: Sequence[Item], num_before: int = 0
) -> tuple[tuple[str, TextFormat | None], tuple[str, str | None]]:
    """Return the format and the effort of the answer, each after the path of the field that sets it.

    An item that updates a setting goes before the request.

    Args:
        num_before: Number of leading items from earlier responses.

    Raises:
        InvalidRequest: if an update has the wrong form; `param` names it.
    """
    form = "text.format", request.text.format if request.text is not None else None
    effort = "reasoning.effort", request.reasoning.effort if request.reasoning is not None else None
    for i, item in enumerate(items, -num_before):
        if item.get("type") != "configuration_update":
            continue
        path = _path(i)
        try:
            update = msgspec.convert(item, ConfigurationUpdate)
        except msgspec.ValidationError as error:
            refuse(path, f"`{path}`: {error}")
        if update.text is not None and update.text.format is not None:
            form = f"{path}.text.format", update.text.format
        if update.reasoning is not None and update.reasoning.effort is not None:
            effort = f"{path}.reasoning.effort", update.reasoning.effort
    return form, effort


def _path(index: int) -> str:
    """Return the path of an item of the input; those of earlier responses have negative indices."""
    return f"input[{index}]" if index >= 0 else "previous_response_id"


def read_items(
    items: Sequence[Item],
    num_before: int = 0,
    images: Images | None = None,
    tools: Sequence[Tool] = (),
) -> list[dict[str, Any]]:
    """Convert items to messages.

    Args:
        num_before: Number of leading items from earlier responses, which have been validated before.
        images: Collects the images of the user's messages; None if the model does not accept images.
        tools: The tools that the model is shown; calls get the names that these have for the model.

    Raises:
        InvalidRequest: if an item is refused; `param` names it.
    """
    names = {(tool.namespace, tool.own_name): tool.name for tool in tools if tool.own_name is not None}
    messages: list[dict[str, Any]] = []
    thoughts: list[str] = []  # the reasoning before the next item, if the assistant made that
    skipped = []
    for i, item in enumerate(items, -num_before):
        path = _path(i)
        match kind := item.get("type") or "message":
            case "reasoning":
                texts = _texts(item.get("content") or [], f"{path}.content", ("reasoning_text",))
                text = _joined(texts) or unsealed(item.get("encrypted_content"))
                if not text:
                    text = _joined(_texts(item.get("summary") or [], f"{path}.summary", ("summary_text",)))
                thoughts.append(text)
            case "tool_search_call" | "tool_search_output" if not is_client_s(item):
                skipped.append(kind)
            case str() if kind in _CALLS:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(_call(item, kind, path, names))
                _add_thoughts(messages[-1], thoughts)
            case str() if kind in _RESULTS:
                messages.append({"role": "tool", "content": _result(item, kind, path, names)})
                name = "call_id"
                if item.get(name) is None and kind == "local_shell_call_output":
                    name = "id"  # in OpenAI's type, this is the call's
                if item.get(name) is not None:
                    messages[-1]["tool_call_id"] = string_of(item, name, path)
            case "agent_message":  # from another agent, to the one that the model is
                content = _parts(_readable(item.get("content")), f"{path}.content", "user", images)
                messages.append({"role": "user", "content": content})
                thoughts.clear()
            case "message":
                role = string_of(item, "role", path)
                if role not in _ROLES:
                    refuse_field(f"{path}.role", f"must be one of {', '.join(_ROLES)}, got {role[:40]!r}")
                content = _parts(item.get("content"), f"{path}.content", role, images)
                if role == "assistant" and messages and "tool_calls" in messages[-1]:
                    _add_text(messages[-1], content)
                else:
                    messages.append({"role": role, "content": content})
                if role == "assistant":
                    _add_thoughts(messages[-1], thoughts)
                else:
                    thoughts.clear()  # of an answer that ended in its reasoning
            case "configuration_update":
                pass  # `current_settings` reads it
            case str() if kind in ("additional_tools", "program") or kind.endswith(_HOSTED):
                skipped.append(kind)
            case _:
                refuse_field(f"{path}.type", f"{str(kind)[:40]!r} is not supported", "invalid_value")
    add_call_ids(messages)
    for message in messages:
        if "reasoning_content" in message:
            message["reasoning_content"] = "\n".join(message["reasoning_content"])
    note_skipped(skipped)
    return messages


def _joined(texts: str | list[str]) -> str:
    return texts if isinstance(texts, str) else "\n".join(texts)


def _add_text(message: dict[str, Any], content: str | list[Any]) -> None:
    """Add text that came after a message's calls: for templates, all of it precedes the calls' results."""
    if not message["content"]:
        message["content"] = content
    elif content:  # in place, because a call may have thousands of such texts after it
        message["content"] = earlier = _listed(message["content"])
        earlier += _listed(content)


def _listed(content: str | list[Any]) -> list[Any]:
    return [content] if isinstance(content, str) else content


def _add_thoughts(message: dict[str, Any], thoughts: list[str]) -> None:
    """Move reasoning to the texts of the message that followed it, which may have earlier reasoning."""
    texts = [text for text in thoughts if text]
    if texts:
        message.setdefault("reasoning_content", []).extend(texts)
    thoughts.clear()


def read_tools(request: ResponsesRequest, items: Sequence[Item] = ()) -> list[Tool]:
    """Return the functions that the model is shown: the request's, and those that items add.

    Args:
        items: The whole conversation.

    Raises:
        InvalidRequest: if one has the wrong form, or two have the same name.
    """
    skipped: list[str] = []
    tools = [tool for i, given in enumerate(request.tools or ()) for tool in _tools(given, i, skipped)]
    listed = {(tool.namespace, tool.name) for tool in tools}
    added: dict[tuple[str | None, str], Tool] = {}  # several searches may find the same tool
    for given in _added_tools(items):
        for tool in _tools(given, len(tools) + len(added), skipped):
            added[tool.namespace, tool.name] = tool
    tools += [tool for key, tool in added.items() if key not in listed]
    tools = distinct(tools)
    check_tools(tools)
    note_skipped(skipped)
    return tools


def _added_tools(items: Sequence[Item]) -> Iterator[Any]:
    """Yield the tools that items add to those of the request."""
    for item in items:
        if item.get("type") == "additional_tools" and isinstance(item.get("tools"), list):
            yield from item["tools"]
        yield from found_in(item)


def _tools(given: Any, index: int, skipped: list[str], namespace: str | None = None) -> Iterator[Tool]:
    """Yield an entry's tools: none for a hosted tool, several for a namespace."""
    path = f"tools[{index}]"
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        refuse_field(f"{path}.type", "is required")
    kind, inner = given["type"], given.get("tools")
    if kind == "namespace" and isinstance(inner, list):
        for each in inner:
            yield from _tools(each, index, skipped, string_of(given, "name", path))
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


def _call(item: Item, kind: str, path: str, names: Mapping[Any, str]) -> dict[str, Any]:
    """Return a call of the history; `names` has the model's names by namespace and client's name."""
    arguments: Any
    if kind in CALLS:
        name, arguments = CALLS[kind].kind, CALLS[kind].arguments_of(item, path)
    else:
        name, namespace = string_of(item, "name", path), item.get("namespace")
        if isinstance(namespace, str):
            name = names.get((namespace, name), name)
        if kind == "custom_tool_call":
            arguments = {CUSTOM_INPUT: string_of(item, "input", path)}
        else:
            arguments = string_of(item, "arguments", path)
    function = {"name": name, "arguments": arguments}
    return {"id": string_of(item, "call_id", path), "type": "function", "function": function}


def _result(item: Item, kind: str, path: str, names: Mapping[Any, str]) -> str | list[str]:
    """Return what the model is shown of a tool's output; `names` as in `_call`."""
    if kind == SEARCH_OUTPUT:
        found = [tool for given in found_in(item) for tool in _tools(given, 0, [])]
        return result_text([names.get((tool.namespace, tool.name), tool.name) for tool in found])
    if kind in OUTPUTS:
        return OUTPUTS[kind].result_of(item, path)
    return _texts(item.get("output"), f"{path}.output", (*_TEXTS, *_OMITTED))


def _readable(content: Any) -> Any:
    """Return an agent's message with plain parts for those that OpenAI's servers would have encrypted.

    They are what the model gave as a tool's arguments (Codex), and nothing here encrypts those.
    """
    if not isinstance(content, list):
        return content
    return [
        {"type": "input_text", "text": part.get("encrypted_content")}
        if isinstance(part, dict) and part.get("type") == "encrypted_content"
        else part
        for part in content
    ]


def _parts(
    content: Any, path: str, role: str, images: Images | None
) -> str | list[str] | list[str | dict[str, str]]:
    """Return a message's text, or its parts, which may be images."""
    if images is None or role != "user":
        return _texts(content, path, why=NO_IMAGES if images is None else ONLY_USERS)
    if not isinstance(content, list):
        return _texts(content, path)
    parts: list[str | dict[str, str]] = []
    for j, part in enumerate(content):
        where = f"{path}[{j}]"
        if kind_of(part, where, (*_TEXTS, "input_image")) != "input_image":
            parts.append(_text(part, where, _TEXTS))
            continue
        if part.get("file_id") is not None:
            refuse_field(f"{where}.file_id", "is not supported: this server keeps no files")
        parts.append(images.add(part.get("image_url"), f"{where}.image_url"))
    return parts


def _texts(content: Any, path: str, kinds: Sequence[str] = _TEXTS, why: str | None = None) -> str | list[str]:
    """Return a content's text, or its parts' texts; `why` says why they may not be images."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse_field(path, "must be a string or a list of parts")
    for j, part in enumerate(content if why is not None else ()):
        if isinstance(part, dict) and part.get("type") == "input_image":
            refuse_field(f"{path}[{j}].type", f"may not be 'input_image': {why}", "invalid_value")
    return [_text(part, f"{path}[{j}]", kinds) for j, part in enumerate(content)]


def _text(part: Any, path: str, kinds: Sequence[str]) -> str:
    """Return a part's text."""
    kind = kind_of(part, path, kinds)
    if kind in _OMITTED:
        return f"[{kind.removeprefix('input_')} omitted]"
    return string_of(part, "refusal" if kind == "refusal" else "text", path)
