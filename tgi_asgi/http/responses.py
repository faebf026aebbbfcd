"""`POST /v1/responses`: OpenAI's newer API, stateless, over the same path as chat completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from tgi_asgi.errors import TgiError
from tgi_asgi.http.collect import collect
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.field_names import renaming
from tgi_asgi.http.openai_answer import Answer
from tgi_asgi.http.openai_chat import CheckedChat, check_chat, submit_chat
from tgi_asgi.http.openai_logprobs import ChatLogprobs, TokenNames
from tgi_asgi.http.openai_params import refuse
from tgi_asgi.http.openai_reply import TEXT_ONLY, ChoiceReply
from tgi_asgi.http.responses_output import Event, ResponseBuilder
from tgi_asgi.http.responses_request import RESPONSES_DECODER, ResponsesRequest, to_chat
from tgi_asgi.http.sse import EventStream
from tgi_asgi.observe.course import stream_headers, sync_headers
from tgi_asgi.types import TokenEvent

_ECHOED = ("metadata", "text", "tools", "tool_choice")
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


async def responses(exchange: Exchange) -> None:
    """Answer `POST /v1/responses`, streamed or whole."""
    served = exchange.context.ready()
    request = await exchange.read_json(RESPONSES_DECODER)
    info = served.info
    with renaming(_NAMES):
        chat = await exchange.work(_check, exchange, request)
        prepared, channel = await submit_chat(exchange, chat)
    reply = ChoiceReply(prepared.reply_plan or TEXT_ONLY)
    answer = Answer.of(
        exchange,
        chat.request,
        info,
        "resp",
        [prepared.generation.prompt_ids],
        num_reasoning=lambda: reply.num_reasoning_tokens,
    )
    tracker = None
    if chat.sampling.logprobs is not None:
        tracker = ChatLogprobs(TokenNames(served.tokenizer))
    renderer = _Renderer(ResponseBuilder(_base(request, answer)), answer, reply, tracker)
    characters = prepared.prompt.num_characters
    if request.stream:
        headers = stream_headers(exchange, info, characters=characters)
        await EventStream(exchange, renderer, headers).run([channel])
        return
    [[events]] = await collect(exchange, [channel])
    renderer.take(events)
    body = renderer.response
    await exchange.reply_json(body, headers=sync_headers(exchange, info, characters=characters))


def _check(exchange: Exchange, request: ResponsesRequest) -> CheckedChat:
    for name in _ECHOED:
        try:
            orjson.dumps(msgspec.to_builtins(getattr(request, name)))
        except (TypeError, RecursionError):  # an integer beyond 64 bits, or too many levels
            refuse(name, f"`{name}` cannot be written back as JSON")
    return check_chat(exchange, to_chat(request))


class _Renderer:
    """Turns token events into the response's events (`sse.Renderer`)."""

    def __init__(
        self, builder: ResponseBuilder, answer: Answer, reply: ChoiceReply, tracker: ChatLogprobs | None
    ) -> None:
        self._builder = builder
        self._answer = answer
        self._reply = reply
        self._tracker = tracker
        self._num_generated = 0
        self._num_sent = 0
        self.response: dict[str, Any] = {}  # the whole one, once it has ended

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the events that new tokens make."""
        begun = [] if self._num_generated else self._builder.begin()
        return self._frames([*begun, *self.take(events)])

    def take(self, events: Sequence[TokenEvent]) -> list[Event]:
        """Take new tokens; return what they make."""
        self._num_generated += len(events)
        pieces = self._reply.push(events, self._tracker)
        taken = self._tracker.take() if self._tracker is not None else None
        made = self._builder.push(pieces, taken["content"] if taken is not None else ())
        if events[-1].finish is not None:
            made += self._builder.finish(self._reply.finish_reason(events[-1]), self._usage())
            self.response = made[-1]["response"]
        return made

    def close(self) -> bytes:
        """Return nothing: the last event says that it is the last."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the event of a response that failed."""
        return self._frames([self._builder.fail(error)])

    def _frames(self, events: Sequence[Event]) -> bytes:
        frames = []
        for event in events:
            numbered = {"type": event["type"], "sequence_number": self._num_sent, **event}
            frames.append(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(numbered)))
            self._num_sent += 1
        return b"".join(frames)

    def _usage(self) -> dict[str, Any]:
        usage = self._answer.usage(self._num_generated)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }


def _base(request: ResponsesRequest, answer: Answer) -> dict[str, Any]:
    """Return the response object's fields that do not change."""
    text = msgspec.to_builtins(request.text) if request.text is not None else {}
    reasoning = request.reasoning
    return {
        "id": answer.id.replace("-", "_", 1),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": answer.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": reasoning.summary if reasoning is not None else None,
        },
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, **{key: value for key, value in text.items() if value}},
        "tool_choice": request.tool_choice or "auto",
        "tools": msgspec.to_builtins(request.tools or []),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
    }
