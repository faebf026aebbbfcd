"""The handlers of `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from tgi_asgi.api.anthropic.request import COUNT_DECODER, parse_messages, read_conversation
from tgi_asgi.api.context import Served
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.life import admitted, generate
from tgi_asgi.api.parse import check_ranges, decode_json
from tgi_asgi.api.prompt import chat_prompt
from tgi_asgi.settings import Settings


async def messages(exchange: Exchange) -> None:
    """Answer `POST /v1/messages`, streamed or whole."""
    _echo_id(exchange)
    await generate(exchange, parse_messages)


async def count_tokens(exchange: Exchange) -> None:
    """Answer `POST /v1/messages/count_tokens` with the length of the prompt."""
    _echo_id(exchange)
    context = exchange.context
    served = context.ready()
    body = await exchange.read_body()
    with admitted(exchange, 1):
        count = await context.in_counting_thread(_count, body, served, context.settings)
    await exchange.respond_json({"input_tokens": count})


def _count(body: bytes, served: Served, settings: Settings) -> int:
    request = decode_json(body, COUNT_DECODER)
    check_ranges(request)
    return len(chat_prompt(read_conversation(request), served, settings, is_bounded=False).ids)


def _echo_id(exchange: Exchange) -> None:
    exchange.response_headers.append((b"request-id", exchange.request_id.encode("ascii")))
