"""Requests of `/v1/messages` (Anthropic's API), and their conversion to calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import msgspec

from tgi_asgi.api.anthropic.documents import document_text, plain_text, result_text, search_text
from tgi_asgi.api.anthropic.render import MessageRenderer
from tgi_asgi.api.anthropic.schema import ClientTool, CountRequest, MessagesRequest, Turn
from tgi_asgi.api.anthropic.summaries import SummaryRenderer, find_summary, is_only_summary
from tgi_asgi.api.anthropic.tools import CHANGES, is_hosted, read_tools
from tgi_asgi.api.call import Call
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.job import Constraint, Conversation, Job, ToolChoice
from tgi_asgi.api.limits import Limits, Overflow, check_stops
from tgi_asgi.api.parse import (
    NO_IMAGES,
    ONLY_USERS,
    check_ranges,
    check_refused,
    decode_json,
    refuse_field,
    string_of,
)
from tgi_asgi.api.prompt_images import Images
from tgi_asgi.api.prompt_text import leaves_open, thinking_variables
from tgi_asgi.api.sampling import sampling
from tgi_asgi.api.summary import summarising
from tgi_asgi.api.thoughts import unsealed
from tgi_asgi.api.tools import Tool, choose
from tgi_asgi.text.chat.message import ChatMessage

_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "named"}
_THINKING = ("adaptive", "between_tools", "disabled", "enabled")
_BILLING = "x-anthropic-billing-header:"
_UNSEEN = (  # blocks of the assistant's turns that only Anthropic's servers read
    "redacted_thinking", "fallback", "server_tool_use", "mcp_tool_use", "mcp_tool_listing",
    "container_upload", "compaction",
)  # fmt: skip
FAILED = "[the tool failed]"  # stands for the result of a failed call without a text


MESSAGES_DECODER = msgspec.json.Decoder(MessagesRequest)
COUNT_DECODER = msgspec.json.Decoder(CountRequest)


def parse_messages(body: bytes, exchange: Exchange) -> Call:
    """Parse a request for a message."""
    request = decode_json(body, MESSAGES_DECODER)
    context = exchange.context
    check_ranges(request)
    check_refused(request)
    stops = tuple(request.stop_sequences or ())
    check_stops(stops, Limits.of(context.settings).stops, "stop_sequences")
    if request.thread is not None:  # this error code makes the SDK send the whole history instead
        rule = "is not supported: this server keeps no conversations"
        refuse_field("thread", rule, "thread_unsupported_request")
    tools = read_tools(request.tools, request.messages)
    info = context.ready().info
    job = Job(
        prompt=read_conversation(request, tools, context.ready().new_images()),
        sampling=sampling(
            info, info.sampling, temperature=request.temperature, top_p=request.top_p, top_k=request.top_k
        ),
        max_tokens=request.max_tokens or 1,
        overflow=Overflow.CLIPPED,  # agents request as many tokens as the largest models allow
        stop=stops,
        constraint=_constraint(request),
        reasoning_budget=_budget(request.thinking),
        tools=_choice(request.tool_choice, tools, request.tools or ()),
        cache_salt=request.cache_salt,
    )
    renderer = MessageRenderer
    if request.compaction is not None:
        renderer = SummaryRenderer
        job = summarising(job, request.compaction.instructions)
    hides_thoughts = (request.thinking or {}).get("display") == "omitted"
    render = partial(renderer, hides_tokens=request.max_tokens == 0, hides_thoughts=hides_thoughts)
    return Call(jobs=[job], render=render, model=request.model, stream=bool(request.stream))


def read_conversation(request: CountRequest, tools: list[Tool], images: Images | None = None) -> Conversation:
    """Return the conversation of a request; its images go to `images`, if the model accepts them.

    Raises:
        InvalidRequest: if a block or a field is refused; `param` names it.
    """
    messages: list[ChatMessage] = []
    system = request.system or ""
    if not isinstance(system, str):  # a counter of Claude Code would prevent shared prefixes
        system = [block for block in system if not str(block.get("text")).startswith(_BILLING)]
    if text := plain_text(system, "system"):
        messages.append({"role": "system", "content": text})
    for _, group in itertools.groupby(_shown(request.messages), key=lambda each: each[1].role):
        messages += _turns([*group], images)
    return Conversation(
        messages,
        tools=[tool.for_template() for tool in tools] or None,
        offers_tools=(request.tool_choice or {}).get("type") != "none",
        variables={} if request.thinking is None else thinking_variables(_thinks(request.thinking)),
        is_continued=leaves_open(messages),
        images=images,
    )


def _shown(turns: Sequence[Turn]) -> Iterator[tuple[str, Turn]]:
    """Yield the turns that the model is shown, with their paths.

    A summary replaces all turns before it. Two kinds of system turns are left out: reminders that end with
    the next turn of the user, and those that only set the effort, which is not used here. Changes of the
    tools outlive their turn.
    """
    last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=0)
    first, summary = find_summary(turns)
    if summary:
        yield f"messages[{first}]", Turn("user", summary)
    for i, turn in enumerate(turns[first:], first):
        path = f"messages[{i}]"
        if turn.role == "system":
            if turn.clear_at == "next_user_message" and i < last_user:
                continue
            if turn.output_config and not turn.content:
                continue
        elif turn.clear_at is not None:
            refuse_field(f"{path}.clear_at", "is only permitted with role `system`")
        if turn.content is None:
            refuse_field(f"{path}.content", "is required")
        if not is_only_summary(turn):
            yield path, turn


def _turns(turns: list[tuple[str, Turn]], images: Images | None) -> list[ChatMessage]:
    """Return turns of one role, with their paths, as messages; tool results become separate messages before.

    User's and assistant's turns are combined, as by Anthropic's API: many templates refuse two in a row.
    """
    path, turn = turns[0]
    role = turn.role
    if role not in ("user", "assistant", "system"):
        refuse_field(f"{path}.role", f"must be user or assistant, got {role[:40]!r}")
    if role == "system":
        return [message for path, turn in turns for message in _combined(role, [(path, turn)], images)]
    return _combined(role, turns, images)


def _combined(role: str, turns: list[tuple[str, Turn]], images: Images | None) -> list[ChatMessage]:
    path, turn = turns[0]
    if len(turns) == 1 and isinstance(turn.content, str):
        return [{"role": role, "content": turn.content}]
    blocks = _Blocks(role, images)
    for path, turn in turns:
        if isinstance(turn.content, str):
            blocks.parts.append(turn.content)
            continue
        for j, block in enumerate(turn.content or ()):
            blocks.read(block, f"{path}.content[{j}]")
    return blocks.messages(path)


@dataclass(slots=True)
class _Blocks:
    """What the blocks of one turn contain, in their order."""

    role: str
    images: Images | None
    parts: list[str | dict[str, str]] = field(default_factory=list)  # texts and images
    results: list[ChatMessage] = field(default_factory=list)  # of tools
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    changes_tools: bool = False

    def read(self, block: dict[str, Any], where: str) -> None:
        """Add a block, whose path is `where`."""
        match self.role, block.get("type"):
            case _, "text":
                self.parts.append(string_of(block, "text", where))
            case "system", str(kind) if kind in CHANGES:  # `read_tools` reads them
                self.changes_tools = True
            case "user", "document":
                self.parts.append(document_text(block, where))
            case "user", "search_result":
                self.parts.append(search_text(block, where))
            case "user", "image" if self.images is not None:
                self.parts.append(_image(block.get("source"), f"{where}.source", self.images))
            case "user", "tool_result":
                text = result_text(block.get("content") or "", f"{where}.content")
                if block.get("is_error") and not text:
                    text = FAILED
                call_id = string_of(block, "tool_use_id", where)
                self.results.append({"role": "tool", "content": text, "tool_call_id": call_id})
            case "assistant", "thinking":
                # Empty: the answer was to omit it, so the signature has it.
                if thought := string_of(block, "thinking", where) or unsealed(block.get("signature")):
                    self.thoughts.append(thought)
            case "assistant", str(kind) if kind in _UNSEEN:
                pass
            case "assistant", str(kind) if kind.endswith("_tool_result"):  # of a tool that a server ran
                pass
            case "assistant", "tool_use":
                self.calls.append(_call(block, where))
            case _, kind:
                rule = f"{str(kind)[:40]!r} is not supported"
                if kind == "image":
                    rule += f": {NO_IMAGES if self.images is None else ONLY_USERS}"
                refuse_field(f"{where}.type", rule, "invalid_value")

    def messages(self, path: str) -> list[ChatMessage]:
        """Return the turn, whose path is `path`, as messages."""
        if self.role != "assistant" and not self.parts:
            if not (self.results or self.changes_tools):
                refuse_field(f"{path}.content", "must have at least one block")
            return self.results
        texts = [part for part in self.parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(self.parts) else self.parts
        message: ChatMessage = {"role": self.role, "content": content or None}
        if self.thoughts:
            message["reasoning_content"] = "\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return [*self.results, message]


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a `tool_use` block as a call of a message."""
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        refuse_field(f"{where}.input", "must be an object")
    function = {"name": string_of(block, "name", where), "arguments": arguments}
    return {"id": string_of(block, "id", where), "type": "function", "function": function}


def _image(source: Any, path: str, images: Images) -> dict[str, str]:
    """Add an image given in base64 or by URL; return its placeholder."""
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "url":
        return images.add(string_of(source, "url", path), path)
    if kind != "base64":
        refuse_field(f"{path}.type", f"must be base64 or url, got {str(kind)[:40]!r}", "invalid_value")
    if not string_of(source, "media_type", path).startswith("image/"):
        refuse_field(f"{path}.media_type", "must be one of images", "invalid_value")
    return images.add(string_of(source, "data", path), path, is_base64=True)


def _choice(
    given: dict[str, Any] | None, tools: list[Tool], offered: Sequence[ClientTool]
) -> ToolChoice | None:
    """Return the tools that the model may call; None if all `offered` tools were skipped.

    A choice of a hosted tool counts as absent.
    """
    given = {"type": "auto"} if given is None else given
    mode = _CHOICES.get(str(given.get("type")))
    if mode is None:
        refuse_field("tool_choice.type", "must be auto, any, tool or none")
    names = [string_of(given, "name", "tool_choice")] if mode == "named" else None
    if offered and not tools:
        return None
    if mode == "named" and any(is_hosted(tool) and tool.name == given["name"] for tool in offered):
        mode, names = "auto", None
    return choose(tools, mode, names, is_parallel=not given.get("disable_parallel_tool_use"))


def _thinks(given: dict[str, Any]) -> bool:
    """Return whether a request's `thinking` lets the model think."""
    kind = given.get("type")
    if kind not in _THINKING:
        known = ", ".join(_THINKING)
        refuse_field("thinking.type", f"must be one of {known}, got {str(kind)[:40]!r}")
    return bool(kind != "disabled")


def _budget(given: dict[str, Any] | None) -> int | Literal["default"]:
    """Return the maximum number of tokens of thinking, as a request's `thinking` has it."""
    value = (given or {}).get("budget_tokens")
    if value is None:
        return "default"
    if type(value) is not int or value < 0:
        refuse_field("thinking.budget_tokens", f"must be an integer of at least 0, got {str(value)[:40]!r}")
    return value


def _constraint(request: MessagesRequest) -> Constraint | None:
    """Return the constraint on the answer's text, if any."""
    name = "output_config.format"
    given = (request.output_config or {}).get("format")
    if given is None:
        given, name = request.output_format, "output_format"
    if given is None:
        return None
    schema = given.get("schema") if isinstance(given, dict) and given.get("type") == "json_schema" else None
    if not isinstance(schema, dict):
        refuse_field(name, "must have type `json_schema` and a `schema`")
    return Constraint.of(name, "json", schema)
