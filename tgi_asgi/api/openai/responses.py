"""`/v1/responses`: OpenAI's newer API, with the newest answers kept for the requests that build on them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import orjson

from tgi_asgi.api.answer import ChoiceReader
from tgi_asgi.api.call import Call, Choices, Constraint, Conversation, Generation, Job, Renderer
from tgi_asgi.api.errors import OPENAI, Dialect
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.openai.chat import effort_variables
from tgi_asgi.api.openai.logprobs import ChatLogprobs, TokenNames
from tgi_asgi.api.openai.params import room_of
from tgi_asgi.api.openai.response_input import (
    RESPONSES_DECODER,
    ResponsesRequest,
    read_items,
    read_tools,
)
from tgi_asgi.api.openai.response_output import Event, ResponseBuilder
from tgi_asgi.api.openai.response_store import Item, StoredResponse
from tgi_asgi.api.openai.tools import read_choice
from tgi_asgi.api.parse import check_ranges, decode_json, refuse
from tgi_asgi.api.sampling import sampling
from tgi_asgi.errors import NotFound, TgiError
from tgi_asgi.types import TokenEvent

RESPONSES = Dialect(
    "responses", OPENAI.envelope, names={"prompt": "input", "max_tokens": "max_output_tokens"}
)
_UNSUPPORTED = ("conversation", "prompt", "background")
_ECHOED = ("metadata", "text", "tools", "tool_choice")
_LOGPROBS = "message.output_text.logprobs"


def parse_response(body: bytes, exchange: Exchange) -> Call:
    """Read a request for a response.

    Raises:
        InvalidRequest: an item or a field is refused; `param` names it.
    """
    request = decode_json(body, RESPONSES_DECODER)
    context = exchange.context
    _check(request)
    tools = read_tools(request)
    limits = Limits.of(context.settings)
    wants_logprobs = _LOGPROBS in (request.include or ())
    if (request.top_logprobs or 0) > limits.top_logprobs:
        refuse("top_logprobs", f"`top_logprobs` must be at most {limits.top_logprobs}")
    before = _previous(request, exchange)
    own: list[Item] = (
        [{"type": "message", "role": "user", "content": request.input}]
        if isinstance(request.input, str)
        else request.input
    )
    items = [*before.items, *own] if before is not None else own
    messages = read_items(items, lambda item_id: context.responses.find_item(item_id, exchange.tenant))
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    choice = read_choice(tools, request.tool_choice, is_parallel=request.parallel_tool_calls is not False)
    job = Job(
        prompt=Conversation(
            messages,
            tools=[tool.for_template() for tool in tools] or None,
            offers_tools=request.tool_choice != "none",
            variables=_variables(request),
        ),
        sampling=sampling(
            context.ready().info,
            temperature=request.temperature,
            top_p=request.top_p,
            logprobs=(request.top_logprobs or 0) if wants_logprobs else None,
        ),
        max_tokens=request.max_output_tokens,
        room=room_of(context.settings),
        constraint=_constraint(request),
        tools=choice,
    )

    def render(generation: Generation) -> Renderer:
        tracker = ChatLogprobs(TokenNames(generation.served.tokenizer)) if wants_logprobs else None
        builder = ResponseBuilder(_base(request, generation.model), tools)
        size = len(body) + (before.size if before is not None else 0)

        def keep(response: dict[str, Any]) -> None:
            if request.store is not False:
                all_items = [*items, *response["output"]]
                whole = size + len(orjson.dumps(response))
                context.responses.keep(StoredResponse(exchange.tenant, response, all_items, whole))

        return _Renderer(generation, builder, tracker, keep)

    return Call(jobs=[job], render=render, model=request.model, stream=bool(request.stream))


async def retrieve(exchange: Exchange) -> None:
    """Answer with a response that is kept."""
    await exchange.respond_json(_stored(exchange, exchange.scope["path_params"]["response"]).body)


async def delete(exchange: Exchange) -> None:
    """Forget a response that is kept."""
    response_id = exchange.scope["path_params"]["response"]
    _stored(exchange, response_id)
    exchange.context.responses.forget(response_id, exchange.tenant)
    await exchange.respond_json({"id": response_id, "object": "response", "deleted": True})


def _stored(exchange: Exchange, response_id: str) -> StoredResponse:
    stored = exchange.context.responses.find(response_id, exchange.tenant)
    if stored is None:
        raise NotFound(
            f"Response with id '{response_id[:80]}' not found.", param="id", code="response_not_found"
        )
    return stored


def _check(request: ResponsesRequest) -> None:
    check_ranges(request)
    for name in _UNSUPPORTED:
        if getattr(request, name) not in (None, False):
            refuse(name, f"`{name}` is not supported by this server", "unsupported_parameter")
    for name in _ECHOED:
        try:
            orjson.dumps(msgspec.to_builtins(getattr(request, name)))
        except (TypeError, RecursionError):  # an integer beyond 64 bits, or too many levels
            refuse(name, f"`{name}` cannot be written back as JSON")


def _previous(request: ResponsesRequest, exchange: Exchange) -> StoredResponse | None:
    """Return the response that this one goes on from."""
    name = request.previous_response_id
    if name is None:
        return None
    stored = exchange.context.responses.find(name, exchange.tenant)
    if stored is None:
        refuse(
            "previous_response_id",
            f"`previous_response_id`: Previous response with id '{name[:80]}' not found.",
            "previous_response_not_found",
        )
    return stored


def _variables(request: ResponsesRequest) -> dict[str, Any]:
    effort = request.reasoning.effort if request.reasoning is not None else None
    return {**effort_variables(effort, "reasoning.effort"), **(request.chat_template_kwargs or {})}


def _constraint(request: ResponsesRequest) -> Constraint | None:
    given = request.text.format if request.text is not None else None
    if given is None or given.type == "text":
        return None
    if given.type not in ("json_object", "json_schema"):
        refuse("text.format.type", "`text.format.type` must be text, json_object or json_schema")
    if given.type == "json_object":
        return Constraint.of("text.format", "json_object", True)
    if given.schema is None:
        refuse("text.format.schema", "`text.format.schema` is required with type `json_schema`")
    return Constraint.of("text.format", "json", given.schema, is_strict=given.strict is True)


class _Renderer:
    """Turns token events into the response's events, or into the whole that they add up to."""

    def __init__(
        self,
        generation: Generation,
        builder: ResponseBuilder,
        tracker: ChatLogprobs | None,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._generation = generation
        self._builder = builder
        self._reader = ChoiceReader(generation.jobs[0].reading)
        self._tracker = tracker
        self._keep = keep
        self._num_generated = 0
        self._num_sent = 0

    def whole(self, parts: Sequence[Choices]) -> bytes:
        """Return the response."""
        return orjson.dumps(self._take(parts[0][0])[-1]["response"])

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the events that new tokens make."""
        begun = [] if self._num_generated else self._builder.begin()
        return self._frames([*begun, *self._take(events)])

    def close(self) -> bytes:
        """Return nothing: the last event says that it is the last."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the event of a response that failed."""
        begun = [] if self._num_sent else self._builder.begin()
        return self._frames([*begun, self._builder.fail(error)])

    def _take(self, events: Sequence[TokenEvent]) -> list[Event]:
        """Take new tokens; return what they make."""
        self._num_generated += len(events)
        pieces = self._reader.push(events, self._tracker)
        taken = self._tracker.take() if self._tracker is not None else None
        made = self._builder.push(pieces, taken["content"] if taken is not None else ())
        last = events[-1]
        if last.finish is not None:
            made += self._builder.finish(last.finish, self._usage())
            self._keep(made[-1]["response"])
        return made

    def _frames(self, events: Sequence[Event]) -> bytes:
        frames = []
        for event in events:
            numbered = {"type": event["type"], "sequence_number": self._num_sent, **event}
            frames.append(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(numbered)))
            self._num_sent += 1
        return b"".join(frames)

    def _usage(self) -> dict[str, Any]:
        num_prompt = self._generation.num_prompt_tokens
        cached = self._generation.num_cached_tokens
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": self._num_generated,
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens},
            "total_tokens": num_prompt + self._num_generated,
        }


def _base(request: ResponsesRequest, model: str) -> dict[str, Any]:
    """Return the response object's fields that do not change."""
    text = msgspec.to_builtins(request.text) if request.text is not None else {}
    reasoning = request.reasoning
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": reasoning.summary if reasoning is not None else None,
        },
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, **{key: value for key, value in text.items() if value}},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
    }
