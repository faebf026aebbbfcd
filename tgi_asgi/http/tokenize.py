"""Tokens of texts and chats, without generating: `/tokenize`, `/detokenize` and `/chat_tokenize`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from starlette.routing import Route

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.http.asgi import JSON
from tgi_asgi.http.by_key import Kind, dispatch
from tgi_asgi.http.context import Served
from tgi_asgi.http.errors import Dialect
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openai_prompt import chat_prompt, chat_text
from tgi_asgi.http.openai_schema import CHAT_DECODER, ChatRequest
from tgi_asgi.http.routing import route
from tgi_asgi.http.tgi_schema import (
    DETOKENIZE,
    PROMPT_TOKENIZE,
    TOKENIZE,
    ChatTokenizeResponse,
    DetokenizeResponse,
    SimpleToken,
    TokenCount,
)
from tgi_asgi.settings import Settings

if TYPE_CHECKING:
    from tgi_asgi.text.tokenizer import Tokenizer


def routes() -> list[Route]:
    """Return the tokenizer's routes."""
    return [
        route("/tokenize", post=tokenize),
        route("/detokenize", post=detokenize),
        route("/chat_tokenize", post=chat_tokenize),
    ]


async def tokenize(exchange: Exchange) -> None:
    """Answer with TGI's array for `inputs`, with ids and their count for `prompt` or `messages`."""
    served = exchange.context.ready()
    match await dispatch(exchange):
        case Kind.INPUTS:
            inputs = (await exchange.read_json(TOKENIZE)).inputs
            body = await exchange.context.in_thread(_encoded_tokens, served.tokenizer, inputs)
            await exchange.reply(200, body, JSON)
        case Kind.PROMPT:
            request = await exchange.read_json(PROMPT_TOKENIZE)
            adds = request.add_special_tokens is not False
            ids = await exchange.context.in_thread(
                served.tokenizer.encode, request.prompt, add_special_tokens=adds
            )
            await _reply_count(exchange, served, ids)
        case Kind.MESSAGES:
            chat = await exchange.read_json(CHAT_DECODER)
            context = exchange.context
            prompt = await context.in_thread(chat_prompt, chat, served, context.settings)
            await _reply_count(exchange, served, prompt.ids)


async def detokenize(exchange: Exchange) -> None:
    """Answer with the text of token ids, special tokens included."""
    exchange.dialect = Dialect.OPENAI
    served = exchange.context.ready()
    ids = (await exchange.read_json(DETOKENIZE)).tokens
    size = served.info.vocab_size
    for i, token_id in enumerate(ids):
        if not 0 <= token_id < size:
            where = f"tokens[{i}]"
            raise InvalidRequest(
                f"`{where}` must be a token id in 0..{size - 1}, got {token_id}", param=where
            )
    text = await exchange.context.in_thread(served.tokenizer.decode, ids, skip_special_tokens=False)
    await exchange.reply(200, msgspec.json.encode(DetokenizeResponse(text)), JSON)


async def chat_tokenize(exchange: Exchange) -> None:
    """Answer with a chat's templated text and its tokens; none are added to it."""
    served = exchange.context.ready()
    chat = await exchange.read_json(CHAT_DECODER)
    body = await exchange.context.in_thread(_encoded_chat, chat, served, exchange.context.settings)
    await exchange.reply(200, body, JSON)


def simple_tokens(text: str, tokens: Iterable[tuple[int, int, int]]) -> list[SimpleToken]:
    """Return a text's tokens (id, and its bytes' offsets) as TGI shows them; an added token has no text."""
    data = text.encode()
    return [
        SimpleToken(id=token_id, text=data[start:stop].decode("utf-8", "replace"), start=start, stop=stop)
        for token_id, start, stop in tokens
    ]


def _encoded_chat(chat: ChatRequest, served: Served, settings: Settings) -> bytes:
    text = chat_text(chat, served, settings)
    tokens = served.tokenizer.encode_with_offsets(
        text.source, add_special_tokens=False, is_marked=text.is_marked
    )
    return msgspec.json.encode(ChatTokenizeResponse(simple_tokens(text.shown, tokens), text.shown))


def _encoded_tokens(tokenizer: Tokenizer, text: str) -> bytes:
    tokens = tokenizer.encode_with_offsets(text, add_special_tokens=True)
    return msgspec.json.encode(simple_tokens(text, tokens))


async def _reply_count(exchange: Exchange, served: Served, ids: list[int]) -> None:
    answer = TokenCount(tokens=ids, count=len(ids), max_model_len=served.info.max_total_tokens)
    await exchange.reply(200, msgspec.json.encode(answer), JSON)
