"""Tokens of texts and chats, without generating: `/tokenize`, `/detokenize` and `/chat_tokenize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from tgi_asgi.api.call import Conversation
from tgi_asgi.api.context import Served
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.life import Permits
from tgi_asgi.api.openai.chat import read_conversation
from tgi_asgi.api.openai.params import check_ids
from tgi_asgi.api.openai.schema import CHAT_DECODER
from tgi_asgi.api.parse import decode_json
from tgi_asgi.api.prompt import chat_prompt, chat_text
from tgi_asgi.api.tgi.by_key import Kind, dispatch
from tgi_asgi.api.tgi.schema import (
    DETOKENIZE,
    PROMPT_TOKENIZE,
    TOKENIZE,
    ChatTokenizeResponse,
    DetokenizeResponse,
    SimpleToken,
    TokenCount,
)
from tgi_asgi.settings import Settings


async def tokenize(exchange: Exchange) -> None:
    """Answer with TGI's array for `inputs`, with ids and their count for `prompt` or `messages`."""
    exchange.context.ready()
    work = {Kind.INPUTS: _text_tokens, Kind.PROMPT: _prompt_count, Kind.MESSAGES: _chat_count}
    await _answer(exchange, work[await dispatch(exchange)])


async def detokenize(exchange: Exchange) -> None:
    """Answer with the text of token ids, special tokens included."""
    await _answer(exchange, _texts)


async def chat_tokenize(exchange: Exchange) -> None:
    """Answer with a chat's templated text and its tokens; none are added to it."""
    await _answer(exchange, _chat_tokens)


async def _answer(exchange: Exchange, work: Callable[[bytes, Served, Settings], bytes]) -> None:
    """Do the work in a thread, under a permit: whoever tokenises takes part in admission."""
    context = exchange.context
    served = context.ready()
    body = await exchange.read_body()
    with Permits(exchange, served.engine, 1):
        answer = await context.in_counting_thread(work, body, served, context.settings)
    await exchange.respond(200, answer)


def _text_tokens(body: bytes, served: Served, settings: Settings) -> bytes:
    text = decode_json(body, TOKENIZE).inputs
    tokens = served.tokenizer.encode_with_offsets(text, add_special_tokens=True)
    return msgspec.json.encode(simple_tokens(text, tokens))


def _prompt_count(body: bytes, served: Served, settings: Settings) -> bytes:
    request = decode_json(body, PROMPT_TOKENIZE)
    adds = request.add_special_tokens is not False
    return _count(served.tokenizer.encode(request.prompt, add_special_tokens=adds), served)


def _chat_count(body: bytes, served: Served, settings: Settings) -> bytes:
    return _count(chat_prompt(_chat(body), served, settings, is_bounded=False).ids, served)


def _chat_tokens(body: bytes, served: Served, settings: Settings) -> bytes:
    text = chat_text(_chat(body), served, settings)
    tokens = served.tokenizer.encode_with_offsets(
        text.source, add_special_tokens=False, is_marked=text.is_marked
    )
    return msgspec.json.encode(ChatTokenizeResponse(simple_tokens(text.shown, tokens), text.shown))


def _texts(body: bytes, served: Served, settings: Settings) -> bytes:
    ids = decode_json(body, DETOKENIZE).tokens
    check_ids(ids, "tokens", served.info.vocab_size)
    return msgspec.json.encode(DetokenizeResponse(served.tokenizer.decode(ids, skip_special_tokens=False)))


def simple_tokens(text: str, tokens: Iterable[tuple[int, int, int]]) -> list[SimpleToken]:
    """Return a text's tokens (id, and its bytes' offsets) as TGI shows them; an added token has no text."""
    data = text.encode()
    return [
        SimpleToken(id=token_id, text=data[start:stop].decode("utf-8", "replace"), start=start, stop=stop)
        for token_id, start, stop in tokens
    ]


def _chat(body: bytes) -> Conversation:
    return read_conversation(decode_json(body, CHAT_DECODER))


def _count(ids: list[int], served: Served) -> bytes:
    answer = TokenCount(tokens=ids, count=len(ids), max_model_len=served.info.max_total_tokens)
    return msgspec.json.encode(answer)
