"""`POST /v1/embeddings`: vectors of texts or token ids, with OpenAI's fields and vLLM's additions."""

from __future__ import annotations

from typing import Literal

import msgspec
import orjson

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.pool_request import PoolRequest, inputs_of, usage
from tgi_asgi.api.parse import Positive, check_ranges, decode_json
from tgi_asgi.api.pool_call import PoolCall, Pooled, embedding_of
from tgi_asgi.api.vectors import as_json, check_dimensions, shape_vector


class EmbeddingRequest(PoolRequest, kw_only=True):
    """Body of `POST /v1/embeddings`."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    use_activation: bool | None = None  # vLLM's newer name for normalize
    # Formats of numbers in base64; vLLM has others.
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["native", "little"] | None = None


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

    adds = request.add_special_tokens is not False
    return request.call(inputs, embedding, answer, adds_special_tokens=adds)
