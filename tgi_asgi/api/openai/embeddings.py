"""`POST /v1/embeddings`: vectors of texts or token ids, with OpenAI's fields and vLLM's additions."""

from __future__ import annotations

from typing import Literal, cast

import msgspec
import orjson
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.params import check_ids
from tgi_asgi.api.parse import Int, Positive, Salt, check_ranges, decode_json, refuse_field
from tgi_asgi.api.pool_call import Input, PoolCall, Pooled, check_num_inputs, embedding_of, read_truncation
from tgi_asgi.api.vectors import as_json, check_dimensions, shape_vector
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.settings import Settings


class EmbeddingRequest(Struct, kw_only=True):
    """Body of `POST /v1/embeddings`."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None  # the side that is cut off
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    use_activation: bool | None = None  # vLLM's newer name for normalize
    # Formats of numbers in base64; vLLM has others.
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["native", "little"] | None = None
    priority: int | None = None
    cache_salt: Salt | None = None


_DECODER = msgspec.json.Decoder(EmbeddingRequest)


def parse_embeddings(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request for embeddings."""
    request = decode_json(body, _DECODER)
    check_ranges(request)
    info, settings = exchange.context.ready().info, exchange.context.settings
    embedding = embedding_of(info)
    check_dimensions(request.dimensions, embedding)
    inputs = inputs_of(request.input, "input", info, settings)
    is_cut = request.dimensions is not None and request.dimensions < embedding.dimensions
    is_normalized = request.use_activation if request.normalize is None else request.normalize
    if is_normalized is None:
        is_normalized = embedding.is_normalized or is_cut
    is_base64 = request.encoding_format == "base64"

    def answer(pooled: Pooled) -> bytes:
        entries = []
        for index, vector in enumerate(pooled.vectors):
            short = shape_vector(vector, request.dimensions, is_normalized=is_normalized)
            shown = as_json(short, is_base64=is_base64)
            entries.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, shown))
        rest = orjson.dumps({"model": pooled.model, "usage": usage(pooled.num_tokens)})
        return b'{"object":"list","data":[%b],%b' % (b",".join(entries), rest[1:])

    return PoolCall(
        inputs=inputs,
        how=embedding,
        answer=answer,
        model=request.model,
        truncation=read_truncation(request.truncate_prompt_tokens, request.truncation_side),
        adds_special_tokens=request.add_special_tokens is not False,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        num_numbers=embedding.dimensions,
    )


def usage(num_tokens: int) -> dict[str, int]:
    """Return the usage object of an answer without generated tokens."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def inputs_of(
    given: str | list[str | int | list[int]], name: str, info: ModelInfo, settings: Settings
) -> list[Input]:
    """Return the inputs of a call; a text or a list of ids is a single input.

    Raises:
        InvalidRequest: if there are none or too many, one is empty, or an id is not a token of the model.
    """
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    items = [given] if is_one else given
    check_num_inputs(len(items), name, settings)
    inputs = []
    for at, item in enumerate(items):
        where = name if is_one else f"{name}[{at}]"
        if not isinstance(item, str | list):
            refuse_field(where, "must be a string or a list of token ids")
        if not item:
            refuse_field(where, "must not be empty")
        if isinstance(item, str):
            inputs.append(Input(item, where))
        else:
            check_ids(item, where, info.vocab_size)
            inputs.append(Input(cast(list[int], item), where))
    return inputs
