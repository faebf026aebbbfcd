"""Tokens of texts and chats, without generating: `/tokenize`, `/detokenize` and `/chat_tokenize`."""

from __future__ import annotations

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
            is_compat = exchange.context.settings.tgi_compat
            prompt = await exchange.context.in_thread(chat_prompt, chat, served, is_compat=is_compat)
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
    is_compat = exchange.context.settings.tgi_compat
    body = await exchange.context.in_thread(_encoded_chat, chat, served, is_compat)
    await exchange.reply(200, body, JSON)


def simple_tokens(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[SimpleToken]:
    """Return a text's tokens with their byte offsets; an added token has no text."""
    data = text.encode()
    return [
        SimpleToken(id=token_id, text=data[start:stop].decode("utf-8", "replace"), start=start, stop=stop)
        for token_id, start, stop in tokenizer.encode_with_offsets(
            text, add_special_tokens=add_special_tokens
        )
    ]


def _encoded_chat(chat: ChatRequest, served: Served, is_compat: bool) -> bytes:
    text = chat_text(chat, served, is_compat=is_compat)
    tokens = simple_tokens(served.tokenizer, text, add_special_tokens=False)
    return msgspec.json.encode(ChatTokenizeResponse(tokens, text))


def _encoded_tokens(tokenizer: Tokenizer, text: str) -> bytes:
    return msgspec.json.encode(simple_tokens(tokenizer, text, add_special_tokens=True))


async def _reply_count(exchange: Exchange, served: Served, ids: list[int]) -> None:
    answer = TokenCount(tokens=ids, count=len(ids), max_model_len=served.info.max_total_tokens)
    await exchange.reply(200, msgspec.json.encode(answer), JSON)
