"""Tokenisation of texts and chats without generation: `/tokenize`, `/detokenize`, `/chat_tokenize`."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import orjson

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.job import Conversation
from tgi_asgi.api.openai.chat import read_conversation
from tgi_asgi.api.openai.params import check_ids
from tgi_asgi.api.openai.schema import CHAT_DECODER, CHAT_TOKENIZE_DECODER, ChatRequest
from tgi_asgi.api.parse import decode_json
from tgi_asgi.api.prompt import chat_prompt, check_countable
from tgi_asgi.api.prompt_text import chat_text, plain_text
from tgi_asgi.api.tgi.body_kind import set_dialect
from tgi_asgi.api.tgi.request import read_inputs
from tgi_asgi.api.tgi.schema import DETOKENIZE, PROMPT_TOKENIZE, TOKENIZE, SimpleToken
from tgi_asgi.api.tokenising import WithImages, after_images, array_of


def tokenize(body: bytes, exchange: Exchange) -> bytes | WithImages:
    """Return TGI's array for `inputs`; for `prompt` or `messages`, vLLM's object with the ids."""
    served, settings = exchange.context.ready(), exchange.context.settings

    def listed(ids: list[int], shows_pieces: bool | None) -> bytes:
        answer = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": served.info.max_total_tokens,
            "token_strs": [served.tokenizer.piece(i) for i in ids] if shows_pieces else None,
        }
        return orjson.dumps(answer)

    match set_dialect(body, exchange):
        case "inputs":
            prompt = read_inputs(decode_json(body, TOKENIZE).inputs, exchange.context)

            def encode_answer() -> bytes:
                text = plain_text(prompt, served)
                check_countable(text, served)
                tokens = served.tokenizer.encode_with_offsets(text, add_special_tokens=True)
                return _array(text, tokens)

            return after_images(prompt.images, encode_answer)
        case "prompt":
            request = decode_json(body, PROMPT_TOKENIZE)
            exchange.context.check_name(request.model)
            check_countable(request.prompt, served)
            adds = request.add_special_tokens is not False
            ids = served.tokenizer.encode(request.prompt, add_special_tokens=adds)
            return listed(ids, request.return_token_strs)
        case _:
            given = decode_json(body, CHAT_TOKENIZE_DECODER)
            chat = _chat(given, exchange)

            def list_chat() -> bytes:
                ids = chat_prompt(chat, served, settings, is_bounded=False).ids
                return listed(ids, given.return_token_strs)

            return after_images(chat.images, list_chat)


def detokenize(body: bytes, exchange: Exchange) -> bytes:
    """Return the text of token ids, including special tokens."""
    served = exchange.context.ready()
    request = decode_json(body, DETOKENIZE)
    exchange.context.check_name(request.model)
    ids = request.tokens
    check_ids(ids, "tokens", served.info.vocab_size)
    return orjson.dumps({"prompt": served.tokenizer.decode(ids, skip_special_tokens=False)})


def chat_tokenize(body: bytes, exchange: Exchange) -> bytes | WithImages:
    """Return a chat's templated text and its tokens."""
    served = exchange.context.ready()
    chat = _chat(decode_json(body, CHAT_DECODER), exchange)

    def encode_answer() -> bytes:
        text = chat_text(chat, served, exchange.context.settings)
        check_countable(text.shown, served)
        tokens = served.tokenizer.encode_with_offsets(
            text.source, add_special_tokens=text.adds_special_tokens, is_marked=text.is_marked
        )
        array = msgspec.Raw(_array(text.shown, tokens))
        return msgspec.json.encode({"tokenize_response": array, "templated_text": text.shown})

    return after_images(chat.images, encode_answer)


def _chat(request: ChatRequest, exchange: Exchange) -> Conversation:
    context = exchange.context
    context.check_name(request.model)
    return read_conversation(
        request, images=context.ready().new_images(), is_compat=context.settings.tgi_compat
    )


def _array(text: str, tokens: Iterable[tuple[int, int, int]]) -> bytes:
    """Return tokens (id, byte offsets) of a text in TGI's form; an added special token has no text."""
    data = text.encode()
    return array_of(
        SimpleToken(id=token_id, text=data[start:stop].decode("utf-8", "replace"), start=start, stop=stop)
        for token_id, start, stop in tokens
    )
