"""The handlers of `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from tgi_asgi.api.anthropic.request import COUNT_DECODER, parse_messages, read_conversation
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.life import Permits, generate
from tgi_asgi.api.parse import check_ranges, decode_json
from tgi_asgi.api.call import Conversation
from tgi_asgi.api.prompt import chat_prompt


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
    with Permits(exchange, served.engine, 1):
        chat = await exchange.work(_read_count, body)
        prompt = await context.in_thread(chat_prompt, chat, served, context.settings)
    await exchange.respond_json({"input_tokens": len(prompt.ids)})


def _read_count(body: bytes) -> Conversation:
    request = decode_json(body, COUNT_DECODER)
    check_ranges(request)
    return read_conversation(request)


def _echo_id(exchange: Exchange) -> None:
    exchange.response_headers.append((b"request-id", exchange.request_id.encode("ascii")))
