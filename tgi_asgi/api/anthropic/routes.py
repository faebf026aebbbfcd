"""Anthropic's routes: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from functools import partial

import orjson

from tgi_asgi.api.anthropic.render import ANTHROPIC
from tgi_asgi.api.anthropic.request import COUNT_DECODER, parse_messages, read_conversation
from tgi_asgi.api.anthropic.schema import CountRequest, MessagesRequest
from tgi_asgi.api.anthropic.tools import read_tools
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.life import generating
from tgi_asgi.api.parse import check_ranges, decode_json
from tgi_asgi.api.prompt import chat_prompt
from tgi_asgi.api.routes import Route
from tgi_asgi.api.tokenising import WithImages, after_images, tokenising


def rows() -> list[Route]:
    """Return the routes."""
    row = partial(Route, "POST", tag="Anthropic", dialect=ANTHROPIC)
    return [
        row(
            "/v1/messages", generating(parse_messages), "Anthropic's messages",
            requests=(MessagesRequest,), generates=True, event=str,
        ),
        row(
            "/v1/messages/count_tokens", tokenising(_count), "Length of a prompt",
            requests=(CountRequest,),
        ),
    ]  # fmt: skip


def _count(body: bytes, exchange: Exchange) -> bytes | WithImages:
    context = exchange.context
    request = decode_json(body, COUNT_DECODER)
    check_ranges(request)
    context.check_name(request.model)
    served = context.ready()
    chat = read_conversation(request, read_tools(request.tools, request.messages), served.new_images())

    def count() -> bytes:
        prompt = chat_prompt(chat, served, context.settings, is_bounded=False)
        return orjson.dumps({"input_tokens": len(prompt.ids)})

    return after_images(chat.images, count)
