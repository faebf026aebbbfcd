"""`POST /v1/embeddings`: texts or token ids to vectors, with what vLLM adds to OpenAI's fields."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import orjson
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.params import check_ids
from tgi_asgi.api.parse import Int, Positive, check_ranges, decode_json, refuse_field
from tgi_asgi.api.pooled import Input, PoolCall, Pooled, check_num_inputs, embedding_of, read_cut
from tgi_asgi.api.vectors import as_json, check_dimensions, shaped


class EmbeddingRequest(Struct, kw_only=True):
    """The body of `POST /v1/embeddings`."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    truncate_prompt_tokens: Int | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    priority: Int | None = None


_DECODER = msgspec.json.Decoder(EmbeddingRequest)


def parse_embeddings(body: bytes, exchange: Exchange) -> PoolCall:
    """Read a request for embeddings."""
    request = decode_json(body, _DECODER)
    check_ranges(request)
    info, settings = exchange.context.ready().info, exchange.context.settings
    embedding = embedding_of(info)
    check_dimensions(request.dimensions, embedding)
    given = listed(request.input)
    check_num_inputs(len(given), "input", settings)
    inputs = [_input(item, _place(at, request.input), info.vocab_size) for at, item in enumerate(given)]
    is_normalized = embedding.is_normalized if request.normalize is None else request.normalize
    is_base64 = request.encoding_format == "base64"

    def answer(pooled: Pooled) -> bytes:
        entries = []
        for index, vector in enumerate(pooled.vectors):
            short = shaped(vector, request.dimensions, is_normalized=is_normalized)
            shown = as_json(short, is_base64=is_base64)
            entries.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, shown))
        rest = orjson.dumps({"model": pooled.model, "usage": usage(pooled.num_tokens)})
        return b'{"object":"list","data":[%b],%b' % (b",".join(entries), rest[1:])

    return PoolCall(
        inputs=inputs,
        how=embedding,
        answer=answer,
        model=request.model,
        cut=read_cut(request.truncate_prompt_tokens),
        adds_special_tokens=request.add_special_tokens is not False,
        priority=request.priority or 0,
        num_numbers=embedding.dimensions,
    )


def usage(num_tokens: int) -> dict[str, int]:
    """Return what an answer without generated tokens says of its tokens."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def listed(given: str | list[Any]) -> list[Any]:
    """Return the inputs: a text and a list of ids are one."""
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    return [given] if is_one else list(given)


def _place(at: int, given: str | list[Any]) -> str:
    is_list = isinstance(given, list) and not isinstance(given[0], int)
    return f"input[{at}]" if is_list else "input"


def _input(item: Any, where: str, vocab_size: int) -> Input:
    if not isinstance(item, str | list):
        refuse_field(where, "must be a string or a list of token ids")
    if not item:
        refuse_field(where, "must not be empty")
    if isinstance(item, list):
        check_ids(item, where, vocab_size)
    return Input(item, where)
