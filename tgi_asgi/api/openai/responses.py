"""`/v1/responses`: OpenAI's newer API; recent answers are stored for requests that build on them."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import msgspec
import orjson

from tgi_asgi.api.call import Call, Conversation, Generation, Job, Renderer
from tgi_asgi.api.errors import OPENAI, Dialect
from tgi_asgi.api.exchange import LARGE_BODY, Exchange
from tgi_asgi.api.life import check_name
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.openai import response_input
from tgi_asgi.api.openai.chat import template_variables
from tgi_asgi.api.openai.logprobs import ChatLogprobs, TokenNames
from tgi_asgi.api.openai.params import (
    check_renamed,
    check_shared,
    job_of,
    one_constraint,
    thinking_budget,
)
from tgi_asgi.api.openai.response_input import ReasoningOptions, ResponsesRequest, TextOptions
from tgi_asgi.api.openai.response_output import ResponseRenderer
from tgi_asgi.api.openai.response_store import MAX_BYTES, StoredResponse
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
from tgi_asgi.api.tokenising import WithImages, after_images
from tgi_asgi.errors import NotFound
from tgi_asgi.settings import MIB
from tgi_asgi.settings.sampling import SamplingDefaults

RESPONSES = Dialect("responses", OPENAI.envelope, names=dict(prompt="input", max_tokens="max_output_tokens"))
_ECHOED = ("text", "reasoning", "tools", "tool_choice")  # fields echoed in the answer, of any length and form
_MAX_PAGE = 100  # items per page, OpenAI's limit
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
    request = decode_json(body, response_input.DECODER)
    _check(request)
    history = _history(request, exchange)
    find = partial(exchange.context.responses.find_item, tenant=exchange.tenant)
    found = response_input.resolve_references(response_input.items_of(request.input), find)
    size = sum(map(len, [*history, *found.values()]))
    if size > MAX_BYTES:  # 400,000 references to one item fit into a body
        refuse_field("input", f"goes on from more than {MAX_BYTES} bytes")
    exchange.is_large |= size > LARGE_BODY
    return partial(_call, request, history, found, exchange)


def _call(
    request: ResponsesRequest, history: Sequence[bytes], found: Mapping[int, bytes], exchange: Exchange
) -> Call:
    context = exchange.context
    info = context.ready().info
    tools = response_input.read_tools(request)
    limits = Limits.of(context.settings)
    included = request.include or ()
    wants_logprobs = "message.output_text.logprobs" in included
    seals_thoughts = "reasoning.encrypted_content" in included
    if (request.top_logprobs or 0) > limits.top_logprobs:
        refuse_field("top_logprobs", f"must be at most {limits.top_logprobs}")
    check_shared(request, limits, info)
    earlier = _items(history)
    given = enumerate(response_input.items_of(request.input))
    items = [decode_json(found[i], response_input.ITEMS)[0] if i in found else item for i, item in given]
    images = context.ready().new_images()
    messages = response_input.read_items([*earlier, *items], len(earlier), images, tools)
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    choice = read_choice(
        tools,
        request.tool_choice,
        offered={tool["type"] for tool in request.tools or ()},
        is_parallel=request.parallel_tool_calls is not False,
    )
    reasoning = request.reasoning or ReasoningOptions()
    form, is_strict = _format(request)
    job = Job(
        prompt=Conversation(
            messages,
            tools=[tool.for_template() for tool in tools] or None,
            offers_tools=request.tool_choice != "none",
            variables=template_variables(reasoning.effort, "reasoning.effort", request.chat_template_kwargs),
            adds_special_tokens=bool(request.add_special_tokens),
            images=images,
        ),
        max_tokens=request.max_output_tokens,
        tools=choice,
        reads_reasoning=request.separate_reasoning is not False,
        shows_reasoning=request.include_reasoning is not False,
        reasoning_budget=thinking_budget(request),
        **job_of(
            request,
            info,
            context.settings,
            (request.top_logprobs or 0) if wants_logprobs else None,
            one_constraint(request, "text.format", form, is_strict=is_strict),
        ),
    )

    is_stored = request.store is not False and context.responses.is_on
    own = msgspec.json.encode(items) if is_stored else None

    def render(generation: Generation) -> Renderer:
        tracker = ChatLogprobs(TokenNames(generation.served.tokenizer)) if wants_logprobs else None

        def store(response: dict[str, Any]) -> None:
            if own is not None:
                made = {item["id"]: orjson.dumps([item]) for item in response["output"]}
                full_history = (*history, own, *made.values())
                stored = StoredResponse(response["id"], orjson.dumps(response), full_history, made)
                context.responses.add(stored, exchange.tenant)

        base = _base(request, generation.model, info.sampling) | {"store": is_stored}
        return ResponseRenderer(
            generation, base, tools, tracker, store, seals_thoughts=seals_thoughts,
            has_summary=reasoning.summary not in (None, "none"),
        )  # fmt: skip

    return Call(jobs=[job], render=render, model=request.model, stream=bool(request.stream))


async def retrieve(exchange: Exchange) -> None:
    """Answer with a stored response."""
    stored = _stored(exchange)
    if _query(exchange.scope["query_string"]).get("stream") == "true":
        refuse_field("stream", "is not supported: the events of a stored response are not kept")
    await exchange.respond(200, stored.body)


async def cancel(exchange: Exchange) -> None:
    """Refuse to cancel: a stored response is finished, because none runs in the background."""
    stored = _stored(exchange)
    refuse("id", f"Response with id '{stored.id}' is finished; only background responses can be cancelled")


async def compact(exchange: Exchange) -> None:
    """Refuse to compact a conversation."""
    raise NotFound(f"Unknown URL: {exchange.method} {exchange.path}: this server compacts no conversations")


async def list_input(exchange: Exchange) -> None:
    """Answer with a page of a stored response's input items, including those of earlier responses."""
    stored = _stored(exchange)
    exchange.is_large |= sum(map(len, stored.history)) > LARGE_BODY
    await exchange.respond(200, await exchange.work(_page, stored, exchange.scope["query_string"]))


def _page(stored: StoredResponse, query_string: bytes) -> bytes:
    """Return the items that a query asks for: `limit` of them, in `order`, after the one with id `after`."""
    query = _query(query_string)
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (re.fullmatch("[0-9]{1,3}", limit) and 1 <= int(limit) <= _MAX_PAGE):
        refuse_field("limit", f"must be 1 to {_MAX_PAGE}, got {limit[:40]!r}")
    if order not in ("asc", "desc"):
        refuse_field("order", f"must be asc or desc, got {order[:40]!r}")
    history = stored.history[: len(stored.history) - len(stored.items)]
    items = [_listed(item, stored.id, i) for i, item in enumerate(_items(history))]
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [i for i, item in enumerate(items, 1) if item["id"] == after]
        if not places:
            refuse_field("after", "names no item of the response's input")
        items = items[places[0] :]
    page = items[: int(limit)]
    first_id, last_id = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    has_more = len(items) > len(page)
    return msgspec.json.encode(  # integers may be of any size, which orjson rejects
        {"object": "list", "data": page, "first_id": first_id, "last_id": last_id, "has_more": has_more}
    )


def _query(query_string: bytes) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query_string.decode("latin-1")).items()}


def count_input(body: bytes, exchange: Exchange) -> bytes | WithImages:
    """Return the number of tokens of a response's prompt; the route is `tokenising(count_input)`."""
    call = parse_response(body, exchange)()
    check_name(exchange, call.model)
    [job] = call.jobs
    context, chat = exchange.context, job.prompt
    assert isinstance(chat, Conversation), "a response's prompt is a conversation"
    served = context.ready()

    def count() -> bytes:
        prompt = chat_prompt(chat, served, context.settings, is_bounded=False)
        return orjson.dumps({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})

    return after_images(chat.images, count)


async def delete(exchange: Exchange) -> None:
    """Delete a stored response."""
    stored = _stored(exchange)
    exchange.context.responses.delete(stored.id, exchange.tenant)
    await exchange.respond_json({"id": stored.id, "object": "response", "deleted": True})


def _stored(exchange: Exchange) -> StoredResponse:
    response_id = exchange.scope["path_params"]["response"]
    stored = exchange.context.responses.find(response_id, exchange.tenant)
    if stored is None:
        message = f"Response with id '{response_id[:80]}' not found."
        raise NotFound(message, param="id", code="response_not_found")
    return stored


def _items(parts: Sequence[bytes]) -> list[dict[str, Any]]:
    return [item for part in parts for item in decode_json(part, response_input.ITEMS)]


def _listed(item: dict[str, Any], response_id: str, index: int) -> dict[str, Any]:
    """Return an input item in the form of lists: with an id, a type, a status, and content in parts."""
    kind, content = item.get("type") or "message", item.get("content")
    is_own = item.get("role") == "assistant"
    if isinstance(content, str):
        content = [{"type": "output_text" if is_own else "input_text", "text": content}]
    if is_own and isinstance(content, list):
        content = [{"annotations": [], **part} if _is_output(part) else part for part in content]
    if content is not None:
        item = {**item, "content": content}
    own_id = item.get("id") if isinstance(item.get("id"), str) else None
    prefix = "msg" if kind == "message" else "item"
    own_id = own_id or f"{prefix}_{response_id.removeprefix('resp_')}_{index}"
    return {"status": "completed", **item, "type": kind, "id": own_id}


def _is_output(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "output_text"


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
    if request.input is None and request.previous_response_id is None:
        refuse_field("input", "is required")
    for name in ("n", "best_of"):
        if getattr(request, name) not in (None, 1):
            refuse_field(name, "may only be 1: a response is one answer", "unsupported_parameter")
    for name in _NAMES:
        if len(getattr(request, name) or "") > MAX_ECHOED_CHARS:
            refuse_field(name, f"must have at most {MAX_ECHOED_CHARS} characters")
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


def _format(request: ResponsesRequest) -> tuple[tuple[str, Any] | None, bool]:
    """Return the kind and value of the text's format, None for plain text; and whether it is strict."""
    given = request.text.format if request.text is not None else None
    if given is None or given.type == "text":
        return None, False
    if given.type == "json_object":
        return ("json_object", True), False
    if given.type != "json_schema":
        refuse_field("text.format.type", "must be text, json_object or json_schema")
    if given.schema is None:
        refuse_field("text.format.schema", "is required with type `json_schema`")
    return ("json", given.schema), given.strict is True


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
        **{name: defaults[name] if value is None else value for name, value in given.items()},
    }
