"""`/v1/responses`: OpenAI's newer API; recent answers are stored for requests that build on them."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import orjson

from tgi_asgi.api.call import Call, Generation, Renderer
from tgi_asgi.api.context import ServerContext
from tgi_asgi.api.errors import OPENAI, Dialect
from tgi_asgi.api.exchange import LARGE_BODY, Exchange
from tgi_asgi.api.job import Constraint, Conversation, Job
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.openai.chat import template_variables
from tgi_asgi.api.openai.compaction import (
    TRIGGER,
    CompactionRenderer,
    SummaryRenderer,
    is_triggered,
    user_messages,
)
from tgi_asgi.api.openai.conversation_store import ConversationStore, StoredConversation, stored_form
from tgi_asgi.api.openai.conversations import find_conversation
from tgi_asgi.api.openai.logprobs import ChatLogprobs, TokenNames
from tgi_asgi.api.openai.params import (
    check_renamed,
    check_shared,
    job_of,
    one_constraint,
    thinking_budget,
)
from tgi_asgi.api.openai.response_input import (
    MANY_REFERENCES,
    ItemPaths,
    current_settings,
    decode_items,
    items_of,
    read_items,
    resolve_references,
)
from tgi_asgi.api.openai.response_output import ResponseRenderer
from tgi_asgi.api.openai.response_schema import (
    DECODER,
    Item,
    ReasoningOptions,
    ResponsesRequest,
    TextFormat,
    TextOptions,
)
from tgi_asgi.api.openai.response_store import MAX_BYTES, ResponseStore, StoredResponse
from tgi_asgi.api.openai.response_tools import read_tools
from tgi_asgi.api.openai.tools import read_choice
from tgi_asgi.api.parse import (
    MAX_ECHOED_CHARS,
    check_ranges,
    check_refused,
    decode_json,
    refuse,
    refuse_field,
)
from tgi_asgi.api.prompt import chat_prompt
from tgi_asgi.api.summary import summarising
from tgi_asgi.api.tokenising import WithImages, after_images
from tgi_asgi.api.tools import Tool
from tgi_asgi.settings import MIB
from tgi_asgi.settings.sampling import SamplingDefaults

RESPONSES = Dialect(
    OPENAI.envelope,
    names={"prompt": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"},
)
_ECHOED = ("text", "reasoning", "tools", "tool_choice")  # fields echoed in the answer, of any length and form
MAX_ECHOED_BYTES = MIB  # of these together: a stream contains them three times
_LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens")  # other APIs' names for max_output_tokens
_NAMES = ("prompt_cache_key", "safety_identifier", "user")  # echoed, but not used
_DEFAULTS: dict[str, Any] = {  # of the fields that an answer echoes
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None, "store": True, "temperature": 1.0,
    "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, **dict.fromkeys(_NAMES),
}  # fmt: skip
_FUNCTION: dict[str, Any] = {"description": None, "parameters": None, "strict": False}


def parse_response(body: bytes, exchange: Exchange) -> Callable[[], Call]:
    """Parse a request for a response; return a function that also parses the stored answers it continues."""
    request = decode_json(body, DECODER)
    _check(request)
    return _parse(request, exchange)


def parse_compaction(body: bytes, exchange: Exchange) -> Callable[[], Call]:
    """Parse a request for a compacted conversation; return what `parse_response` does."""
    request = decode_json(body, DECODER)
    _check(request)
    if request.model is None:
        refuse_field("model", "is required")
    if request.stream:
        refuse_field("stream", "is not supported: a compacted conversation comes as a whole")
    if request.only_prewarms:
        refuse_field("prompt_cache_options.prewarm", "is not supported: there would be no summary")
    if is_triggered(items_of(request.input)):
        refuse_field("input", "asks for a summary, as this route does anyway")
    request.input = [*items_of(request.input), TRIGGER]
    return _parse(request, exchange, is_compact=True)


def _parse(request: ResponsesRequest, exchange: Exchange, *, is_compact: bool = False) -> Callable[[], Call]:
    """Find what a checked request continues or refers to; return a function that parses that, too.

    Args:
        is_compact: Whether the answer is the compacted conversation instead of a response.
    """
    conversation = None
    if request.conversation_id is not None:
        conversation = find_conversation(exchange, request.conversation_id)
        history: Sequence[bytes] = [*exchange.context.conversations.items_of(conversation).values()]
    else:
        history = _history(request, exchange)
    find = partial(exchange.context.responses.find_item, tenant=exchange.tenant)
    found = resolve_references(items_of(request.input), find)
    size = sum(map(len, [*history, *found.values()]))
    if size > MAX_BYTES:  # 400,000 references to one item fit into a body
        refuse_field("input", f"goes on from more than {MAX_BYTES} bytes")
    exchange.is_large |= size > LARGE_BODY or len(found) > MANY_REFERENCES
    return partial(_call, request, history, found, exchange, conversation, is_compact=is_compact)


def _call(
    request: ResponsesRequest,
    history: Sequence[bytes],
    found: Mapping[int, bytes],
    exchange: Exchange,
    conversation: StoredConversation | None,
    *,
    is_compact: bool,
) -> Call:
    """Return the call of a checked request.

    Args:
        history: The conversation that it continues, as in `StoredResponse`.
        found: The stored items that its input refers to, by index in the input.
        conversation: The conversation that `history` is, if it is one.
        is_compact: As in `_parse`.
    """
    context = exchange.context
    info, limits = context.ready().info, Limits.of(context.settings)
    if (request.top_logprobs or 0) > limits.top_logprobs:
        refuse_field("top_logprobs", f"must be at most {limits.top_logprobs}")
    check_shared(request, limits, info)
    given = enumerate(items_of(request.input))
    items = [decode_items([found[i]])[0] if i in found else item for i, item in given]
    earlier = decode_items(history)
    tools = read_tools(request, [*earlier, *items])
    asks_for_summary = is_triggered(items)
    job = _job(request, earlier, items, tools, context)
    if asks_for_summary:
        job = summarising(job)
    is_stored = request.store is not False and context.responses.is_on and not is_compact
    recorders: list[Callable[[dict[str, Any]], None]] = []
    if is_stored:
        full_input = (*history, msgspec.json.encode(items))
        recorders.append(_Recorder(context.responses, full_input, exchange.tenant))
    if conversation is not None and not request.only_prewarms and not is_compact:
        asked = stored_form(items)
        recorders.append(partial(_add_turn, context.conversations, conversation, asked))
    shows_logprobs = job.sampling.logprobs is not None
    wanted_summary = request.reasoning.summary if request.reasoning is not None else None

    kind = ResponseRenderer
    if is_compact:
        kind = CompactionRenderer
    elif asks_for_summary and not request.only_prewarms:
        kind = SummaryRenderer

    def render(generation: Generation) -> Renderer:
        base = _base(request, generation.model, info.sampling) | {"store": is_stored}
        if is_compact:
            base["output"] += user_messages([*earlier, *items], base["id"].removeprefix("resp_"))
        return kind(
            generation,
            base,
            tools,
            ChatLogprobs(TokenNames(generation.served.tokenizer)) if shows_logprobs else None,
            recorders,
            hides_tokens=request.only_prewarms,
            seals_thoughts=request.includes("reasoning.encrypted_content"),
            has_summary=wanted_summary not in (None, "none"),
        )

    return Call(
        jobs=[job], render=render, model=request.model, stream=bool(request.stream),
        num_repeats=4 if shows_logprobs else 0,
    )  # fmt: skip


def _job(
    request: ResponsesRequest,
    earlier: Sequence[Item],
    items: Sequence[Item],
    tools: Sequence[Tool],
    context: ServerContext,
) -> Job:
    """Return the job of a request with these items, after those of earlier responses."""
    served, whole = context.ready(), [*earlier, *items]
    paths = ItemPaths(earlier="previous_response_id" if request.conversation_id is None else "conversation")
    form, (effort_field, effort) = current_settings(request, whole, len(earlier), paths)
    images = served.new_images()
    messages = read_items(whole, len(earlier), images, tools, paths)
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    conversation = Conversation(
        messages,
        tools=[tool.for_template() for tool in tools] or None,
        offers_tools=request.tool_choice != "none",
        variables=template_variables(effort, effort_field, request.chat_template_kwargs),
        adds_special_tokens=request.add_special_tokens,
        images=images,
    )
    choice = read_choice(
        tools,
        request.tool_choice,
        offered={tool["type"] for tool in request.tools or ()},
        is_parallel=request.parallel_tool_calls is not False,
    )
    job = job_of(
        request,
        conversation,
        served.info,
        context.settings,
        logprobs=request.num_logprobs,
        constraint=_constraint(request, *form),
    )
    return dataclasses.replace(
        job,
        max_tokens=1 if request.only_prewarms else request.max_output_tokens,
        tools=choice,
        reads_reasoning=request.separate_reasoning is not False,
        shows_reasoning=request.include_reasoning is not False,
        reasoning_budget=thinking_budget(request),
    )


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Stores a finished answer with the conversation that led to it."""

    responses: ResponseStore
    full_input: Sequence[bytes]
    tenant: str | None

    def __call__(self, response: dict[str, Any]) -> None:
        made = {item["id"]: orjson.dumps([item]) for item in response["output"]}
        history = (*self.full_input, *made.values())
        stored = StoredResponse(response["id"], orjson.dumps(response), history, made)
        self.responses.add(stored, self.tenant)


def _add_turn(
    store: ConversationStore,
    conversation: StoredConversation,
    asked: Mapping[str, bytes],
    response: dict[str, Any],
) -> None:
    """Add a finished answer to its conversation, after the input that it answers."""
    made = {item["id"]: orjson.dumps([item]) for item in response["output"]}
    store.append(conversation, {**asked, **made})


def count_input(body: bytes, exchange: Exchange) -> bytes | WithImages:
    """Return the number of tokens of a response's prompt; the route is `tokenising(count_input)`."""
    call = parse_response(body, exchange)()
    exchange.context.check_name(call.model)
    [job] = call.jobs
    context, chat = exchange.context, job.prompt
    assert isinstance(chat, Conversation), "a response's prompt is a conversation"
    served = context.ready()

    def count() -> bytes:
        prompt = chat_prompt(chat, served, context.settings, is_bounded=False)
        return orjson.dumps({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})

    return after_images(chat.images, count)


def _check(request: ResponsesRequest) -> None:
    check_ranges(request)
    check_refused(request)
    text, reasoning = request.text or TextOptions(), request.reasoning or ReasoningOptions()
    limit = ("max_output_tokens", request.max_output_tokens)
    renamed: dict[str, tuple[str, Any]] = {
        **dict.fromkeys(_LIMITS, limit),
        "response_format": ("text.format", text.format),
        "reasoning_effort": ("reasoning.effort", reasoning.effort),
        "messages": ("input", request.input),
    }
    check_renamed(request, renamed)
    if request.conversation_id is not None and request.previous_response_id is not None:
        rule = "and `previous_response_id` exclude each other: both say what comes before"
        refuse_field("conversation", rule, "mutually_exclusive_parameters")
    if request.input is None and request.previous_response_id is None and request.conversation_id is None:
        refuse_field("input", "is required")
    for name in ("n", "best_of"):
        if getattr(request, name) not in (None, 1):
            refuse_field(name, "may only be 1: a response is one answer", "unsupported_parameter")
    for name in _NAMES:
        if len(getattr(request, name) or "") > MAX_ECHOED_CHARS:
            refuse_field(name, f"must have at most {MAX_ECHOED_CHARS} characters")
    _check_echoed(request)


def _check_echoed(request: ResponsesRequest) -> None:
    """Refuse fields that the response could not repeat."""
    size = 0
    for name in _ECHOED:
        try:
            value = msgspec.to_builtins(getattr(request, name))
            size += len(orjson.dumps({"response": {name: value}}))  # nested as deep as in an event
        except (TypeError, RecursionError):  # integers over 64 bits, or too many levels
            refuse_field(name, "cannot be written back as JSON")
        if size > MAX_ECHOED_BYTES:
            fields = ", ".join(f"`{each}`" for each in _ECHOED)
            refuse_field(name, f"is too long: {fields} take at most {MAX_ECHOED_BYTES} bytes together")


def _history(request: ResponsesRequest, exchange: Exchange) -> Sequence[bytes]:
    """Return the conversation up to the end of the response that this one continues."""
    name = request.previous_response_id
    if name is None:
        return ()
    stored = exchange.context.responses.find(name, exchange.tenant)
    if stored is None:
        message = f"`previous_response_id`: Previous response with id '{name[:80]}' not found."
        refuse("previous_response_id", message, "previous_response_not_found")
    return stored.history


def _constraint(request: ResponsesRequest, field: str, form: TextFormat | None) -> Constraint | None:
    """Return the constraint on the answer's text, if any; `field` is the path of its format."""
    wanted: tuple[str, Any] | None = None
    match form:
        case None | TextFormat(type="text"):
            pass
        case TextFormat(type="json_object"):
            wanted = "json_object", True
        case TextFormat(type="json_schema", schema=None):
            refuse_field(f"{field}.schema", "is required with type `json_schema`")
        case TextFormat(type="json_schema", schema=schema):
            wanted = "json", schema
        case _:
            refuse_field(f"{field}.type", "must be text, json_object or json_schema")
    is_strict = wanted is not None and form is not None and form.strict is True
    return one_constraint(request, field, wanted, is_strict=is_strict)


def _base(request: ResponsesRequest, model: str, sampling: SamplingDefaults) -> dict[str, Any]:
    """Return the response object as it is before the first token."""
    defaults = _DEFAULTS | sampling.given()
    text = msgspec.to_builtins(request.text) if request.text is not None else {}
    reasoning = msgspec.to_builtins(request.reasoning or ReasoningOptions())
    del reasoning["generate_summary"]
    given = {name: getattr(request, name) for name in _DEFAULTS}
    given["tools"] = [  # clients' types require all of a function's fields
        {**_FUNCTION, **tool} if tool.get("type") == "function" else tool for tool in request.tools or ()
    ]
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "service_tier": "default",
        "reasoning": reasoning,
        "text": {"format": {"type": "text"}, **{key: value for key, value in text.items() if value}},
        "truncation": "disabled",
        "usage": None,
        **({"conversation": {"id": request.conversation_id}} if request.conversation_id else {}),
        **{name: defaults[name] if value is None else value for name, value in given.items()},
    }
