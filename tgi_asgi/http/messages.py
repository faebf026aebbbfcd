"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API over the path of chat completions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson

from tgi_asgi.errors import TgiError
from tgi_asgi.http.collect import collect
from tgi_asgi.http.errors import Dialect, envelope
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.field_names import renaming
from tgi_asgi.http.messages_request import COUNT_DECODER, MESSAGES_DECODER, CountRequest, to_chat
from tgi_asgi.http.openai_answer import Answer
from tgi_asgi.http.openai_chat import CheckedChat, check_chat, submit_chat
from tgi_asgi.http.openai_prompt import chat_prompt
from tgi_asgi.http.openai_reply import TEXT_ONLY, ChoiceReply
from tgi_asgi.http.sse import EventStream
from tgi_asgi.observe.course import stream_headers, sync_headers
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent

Event = dict[str, Any]
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}


async def messages(exchange: Exchange) -> None:
    """Answer `POST /v1/messages`, streamed or whole."""
    _speak(exchange)
    served = exchange.context.ready()
    request = await exchange.read_json(MESSAGES_DECODER)
    with renaming(_NAMES):
        chat = await exchange.work(_check, exchange, request)
        prepared, channel = await submit_chat(exchange, chat)
    reply = ChoiceReply(prepared.reply_plan or TEXT_ONLY)
    prompts = [prepared.generation.prompt_ids]
    answer = Answer.of(exchange, chat.request, served.info, "msg", prompts)
    renderer = _Renderer(answer, reply)
    characters = prepared.prompt.num_characters
    if request.stream:
        headers = stream_headers(exchange, served.info, characters=characters)
        await EventStream(exchange, renderer, headers).run([channel])
        return
    [[events]] = await collect(exchange, [channel])
    renderer.take(events)
    headers = sync_headers(exchange, served.info, characters=characters)
    await exchange.reply_json(renderer.whole(), headers=headers)


async def count_tokens(exchange: Exchange) -> None:
    """Answer `POST /v1/messages/count_tokens` with the length of the prompt."""
    _speak(exchange)
    served = exchange.context.ready()
    request = await exchange.read_json(COUNT_DECODER)
    context = exchange.context
    with renaming(_NAMES):
        chat = await exchange.work(_check, exchange, request)
        prompt = await context.in_thread(chat_prompt, chat.request, served, context.settings)
    await exchange.reply_json({"input_tokens": len(prompt.ids)})


def _speak(exchange: Exchange) -> None:
    exchange.response_headers.append((b"request-id", exchange.request_id.encode("ascii")))


def _check(exchange: Exchange, request: CountRequest) -> CheckedChat:
    return check_chat(exchange, to_chat(request))


class _Renderer:
    """Turns token events into content blocks and their events (`sse.Renderer`)."""

    def __init__(self, answer: Answer, reply: ChoiceReply) -> None:
        self._answer = answer
        self._reply = reply
        self._num_generated = 0
        self._blocks: list[dict[str, Any]] = []
        self._inputs: list[str] = []  # by block: the text of a call's arguments
        self._kind: type[Piece] | None = None  # of the block that is open
        self._stop: tuple[str | None, str | None] = (None, None)

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the events that new tokens make."""
        # Made into bytes at once: the message changes with what is taken next.
        start = b"" if self._num_generated else _frame({"type": "message_start", "message": self.whole()})
        return start + b"".join(map(_frame, self.take(events)))

    def take(self, events: Sequence[TokenEvent]) -> list[Event]:
        """Take new tokens; return what they make."""
        self._num_generated += len(events)
        made: list[Event] = []
        for piece in self._reply.push(events):
            made += self._add(piece)
        last = events[-1]
        if last.finish is None:
            return made
        if not self._blocks:
            made += self._open(Content(""), Content)
        made += self._close()
        self._stop = self._stop_of(last)
        reason, sequence = self._stop
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        made.append({"type": "message_delta", "delta": delta, "usage": self._usage()})
        return [*made, {"type": "message_stop"}]

    def close(self) -> bytes:
        """Return nothing: the last event says that it is the last."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the error as an event."""
        return _frame(envelope(error, Dialect.ANTHROPIC))

    def whole(self) -> dict[str, Any]:
        """Return the message as it is now."""
        for block, text in zip(self._blocks, self._inputs, strict=True):
            if block["type"] == "tool_use":
                block["input"] = _parsed(text)
        reason, sequence = self._stop
        return {
            "id": self._answer.id.replace("-", "_", 1),
            "type": "message",
            "role": "assistant",
            "model": self._answer.model,
            "content": self._blocks,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _add(self, piece: Piece) -> list[Event]:
        kind = CallStart if isinstance(piece, CallArguments) else type(piece)
        made: list[Event] = []
        if isinstance(piece, CallStart) or kind is not self._kind:
            made = [*self._close(), *self._open(piece, kind)]
        if isinstance(piece, CallStart):
            return made
        block = self._blocks[-1]
        if isinstance(piece, CallArguments):
            self._inputs[-1] += piece.text
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        else:
            name = block["type"]
            block[name] += piece.text
            delta = {"type": f"{name}_delta", name: piece.text}
        return [*made, {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}]

    def _open(self, piece: Piece, kind: type[Piece]) -> list[Event]:
        block: dict[str, Any]
        if isinstance(piece, CallStart):
            block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": piece.name}
            block["input"] = {}
        elif isinstance(piece, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self._kind = kind
        self._blocks.append(block)
        self._inputs.append("")
        index = len(self._blocks) - 1
        return [{"type": "content_block_start", "index": index, "content_block": dict(block)}]

    def _close(self) -> list[Event]:
        if self._kind is None:
            return []
        self._kind = None
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _stop_of(self, event: TokenEvent) -> tuple[str, str | None]:
        if event.finish is FinishReason.LENGTH:
            return "max_tokens", None
        if isinstance(event.stop, str):
            return "stop_sequence", event.stop
        is_call = any(block["type"] == "tool_use" for block in self._blocks)
        return ("tool_use" if is_call else "end_turn"), None

    def _usage(self) -> dict[str, Any]:
        usage = self._answer.usage(self._num_generated)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "output_tokens": usage["completion_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }


def _frame(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))


def _parsed(text: str) -> Any:
    """Return a call's arguments; what `max_tokens` has cut is no JSON, and so nothing."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
