"""The input of `/v1/responses`: items to messages.

Items that carry something unusable are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tgi_asgi.api.openai.client_tools import CALLS, OUTPUTS
from tgi_asgi.api.openai.response_schema import ConfigurationUpdate, Item, ResponsesRequest, TextFormat
from tgi_asgi.api.openai.response_tools import tools_of
from tgi_asgi.api.openai.tool_search import OUTPUT as SEARCH_OUTPUT
from tgi_asgi.api.openai.tool_search import found_in, is_run_by_client, result_text
from tgi_asgi.api.openai.tools import add_call_ids
from tgi_asgi.api.parse import (
    NO_IMAGES,
    ONLY_USERS,
    decode_json,
    kind_of,
    refuse,
    refuse_field,
    string_of,
)
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.api.thoughts import unsealed
from tgi_asgi.api.tools import CUSTOM_INPUT, Tool, note_skipped
from tgi_asgi.text.chat.message import ChatMessage

MANY_REFERENCES = 100  # reading what these refer to takes a millisecond
_ROLES = ("assistant", "developer", "system", "user")
_TEXTS = ("input_text", "output_text", "text", "refusal")
# Suffixes of hosted tools' item types.
_HOSTED = ("_call", "_output", "_list_tools", "_approval_request", "_approval_response")
_UNSEEN = ("additional_tools", "compaction", "program")  # a compaction of OpenAI's can only be read there
_OMITTED = ("input_image", "input_file")  # named in tool outputs, but not shown
_SUMMARY = "A summary of the conversation so far:"
_SUMMARY_ROLE = "summary"  # until it is known which summary is the last
_CALLS = ("function_call", "custom_tool_call", *CALLS)
_RESULTS = ("function_call_output", "custom_tool_call_output", SEARCH_OUTPUT, *OUTPUTS)


_ITEMS = msgspec.json.Decoder(list[dict[str, Any]])


@dataclass(frozen=True, slots=True)
class ItemPaths:
    """How items are named to the client: those that it has sent, and those that were stored before.

    Attributes:
        given: Path of the list of items that the request has.
        earlier: Field that refers to the stored items.
    """

    given: str = "input"
    earlier: str = "previous_response_id"

    def of(self, index: int) -> str:
        """Return the path of an item; those that were stored have negative indices."""
        return f"{self.given}[{index}]" if index >= 0 else self.earlier


INPUT = ItemPaths()


def items_of(given: str | list[Item] | None) -> list[Item]:
    """Return an input as a list of items."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return given or []


def decode_items(stored: Sequence[bytes]) -> list[Item]:
    """Return the items of stored lists, one after another."""
    return [item for part in stored for item in decode_json(part, _ITEMS)]


def resolve_references(
    items: Sequence[Item], find: Callable[[str], bytes | None], paths: ItemPaths = INPUT
) -> dict[int, bytes]:
    """Return the stored items that references point to, by index, as `find` returns them for an id.

    Raises:
        InvalidRequest: if there is no such item; `param` names the reference.
    """
    found = {}
    for i, item in enumerate(items):
        if _is_reference(item):
            path = paths.of(i)
            stored = find(string_of(item, "id", path))
            if stored is None:
                refuse(f"{path}.id", f"`{path}.id`: no such item is stored", "item_not_found")
            found[i] = stored
    return found


def _is_reference(item: Item) -> bool:
    """Return whether an item only names another one, by its id; messages have no type either."""
    if item.get("type") is None:
        return "id" in item and not item.keys() & {"role", "content"}
    return bool(item["type"] == "item_reference")


def current_settings(
    request: ResponsesRequest, items: Sequence[Item], num_before: int = 0, paths: ItemPaths = INPUT
) -> tuple[tuple[str, TextFormat | None], tuple[str, str | None]]:
    """Return the format and the effort of the answer, each after the path of the field that sets it.

    An item that updates a setting takes precedence over the request.

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
        path = paths.of(i)
        try:
            update = msgspec.convert(item, ConfigurationUpdate)
        except msgspec.ValidationError as error:
            refuse(path, f"`{path}`: {error}")
        if update.text is not None and update.text.format is not None:
            form = f"{path}.text.format", update.text.format
        if update.reasoning is not None and update.reasoning.effort is not None:
            effort = f"{path}.reasoning.effort", update.reasoning.effort
    return form, effort


def read_items(
    items: Sequence[Item],
    num_before: int = 0,
    images: Images | None = None,
    tools: Sequence[Tool] = (),
    paths: ItemPaths = INPUT,
) -> list[ChatMessage]:
    """Convert items to messages.

    Args:
        num_before: Number of leading items from earlier responses, which have been validated before.
        images: Collects the images of the user's messages; None if the model does not accept images.
        tools: The tools that the model is shown; calls get the names that these have for the model.

    Raises:
        InvalidRequest: if an item is refused; `param` names it.
    """
    names = {(tool.namespace, tool.own_name): tool.name for tool in tools if tool.own_name is not None}
    messages = _Messages(images, names)
    for i, item in enumerate(items, -num_before):
        messages.read(item, paths.of(i))
    note_skipped(messages.skipped)
    found = _since_summary(messages.found)
    add_call_ids(found)
    for message in found:
        if "reasoning_content" in message:
            message["reasoning_content"] = "\n".join(message["reasoning_content"])
    return found


@dataclass(slots=True)
class _Messages:
    """The messages that items become, in their order.

    Attributes:
        images: Collects images; None if the model does not accept them.
        names: The model's names of tools, by namespace and client's name.
        found: The messages; their reasoning is still a list of texts.
        thoughts: The reasoning before the next item, if the assistant made that.
        skipped: Types of items that carry nothing usable.
    """

    images: Images | None
    names: Mapping[Any, str]
    found: list[ChatMessage] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def read(self, item: Item, path: str) -> None:
        """Add an item, whose path is `path`."""
        match kind := item.get("type") or "message":
            case "reasoning":
                self.thoughts.append(_reasoning(item, path))
            case "tool_search_call" | "tool_search_output" if not is_run_by_client(item):
                self.skipped.append(kind)
            case str() if kind in _CALLS:
                self._call(_call(item, kind, path, self.names))
            case str() if kind in _RESULTS:
                self._result(item, kind, path)
            case "agent_message":  # from another agent, to the one that the model is
                self._message("user", _readable(item.get("content")), f"{path}.content")
            case "message":
                role = string_of(item, "role", path)
                if role not in _ROLES:
                    refuse_field(f"{path}.role", f"must be one of {', '.join(_ROLES)}, got {role[:40]!r}")
                self._message(role, item.get("content"), f"{path}.content")
            case "compaction" if text := unsealed(item.get("encrypted_content")):
                self._message(_SUMMARY_ROLE, f"{_SUMMARY}\n\n{text}", "")
            case "configuration_update" | "compaction_trigger":
                pass  # `current_settings` and `is_triggered` read them
            case str() if kind in _UNSEEN or kind.endswith(_HOSTED):
                self.skipped.append(kind)
            case _:
                refuse_field(f"{path}.type", f"{str(kind)[:40]!r} is not supported", "invalid_value")

    def _call(self, call: dict[str, Any]) -> None:
        if not self.found or self.found[-1]["role"] != "assistant":
            self.found.append({"role": "assistant", "content": None})
        self.found[-1].setdefault("tool_calls", []).append(call)
        self._add_thoughts()

    def _result(self, item: Item, kind: str, path: str) -> None:
        message = {"role": "tool", "content": _result(item, kind, path, self.names)}
        name = "call_id"
        if item.get(name) is None and kind == "local_shell_call_output":
            name = "id"  # in OpenAI's type, this is the call's
        if item.get(name) is not None:
            message["tool_call_id"] = string_of(item, name, path)
        self.found.append(message)

    def _message(self, role: str, content: Any, path: str) -> None:
        parts = _parts(content, path, role, self.images)
        if role == "assistant" and self.found and "tool_calls" in self.found[-1]:
            _add_text(self.found[-1], parts)
        else:
            self.found.append({"role": role, "content": parts})
        if role == "assistant":
            self._add_thoughts()
        else:
            self.thoughts.clear()  # of an answer that ended in its reasoning

    def _add_thoughts(self) -> None:
        """Move reasoning to the texts of the message that followed it, which may have earlier reasoning."""
        if texts := [text for text in self.thoughts if text]:
            self.found[-1].setdefault("reasoning_content", []).extend(texts)
        self.thoughts.clear()


def _since_summary(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return messages with the last summary in place of what the assistant and its tools said before it.

    It replaces earlier summaries, too, which the model saw when it wrote this one.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == _SUMMARY_ROLE), default=None)
    if last is None:
        return messages
    replaced = ("assistant", "tool", _SUMMARY_ROLE)
    kept = [message for message in messages[:last] if message["role"] not in replaced]
    return [*kept, {**messages[last], "role": "user"}, *messages[last + 1 :]]


def _reasoning(item: Item, path: str) -> str:
    """Return the text of a reasoning item, which is in one of three fields."""
    texts = _texts(item.get("content") or [], f"{path}.content", ("reasoning_text",))
    if text := _joined(texts) or unsealed(item.get("encrypted_content")):
        return text
    return _joined(_texts(item.get("summary") or [], f"{path}.summary", ("summary_text",)))


def _joined(texts: str | list[str]) -> str:
    return texts if isinstance(texts, str) else "\n".join(texts)


def _add_text(message: ChatMessage, content: str | list[Any]) -> None:
    """Add text that came after a message's calls: for templates, all of it precedes the calls' results."""
    if not message["content"]:
        message["content"] = content
    elif content:  # in place, because a call may have thousands of such texts after it
        message["content"] = earlier = _listed(message["content"])
        earlier += _listed(content)


def _listed(content: str | list[Any]) -> list[Any]:
    return [content] if isinstance(content, str) else content


def _call(item: Item, kind: str, path: str, names: Mapping[Any, str]) -> dict[str, Any]:
    """Return a call of the history; `names` has the model's names by namespace and client's name."""
    arguments: Any
    if kind in CALLS:
        name, arguments = CALLS[kind].kind, CALLS[kind].arguments_of(item, path)
        name = names.get((None, name), name)
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
        found = [tool for given in found_in(item) for tool in tools_of(given, 0, [])]
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
