"""TEI's requests to embed and to rank texts, and their answers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import orjson
from msgspec import Struct

from tgi_asgi.api.errors import NATIVE, Dialect, rule_of
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.pool_request import inputs_of
from tgi_asgi.api.openai.ranking import Scored, parse_rerank
from tgi_asgi.api.parse import Positive, check_ranges, decode_json, refuse_field
from tgi_asgi.api.pool_call import Input, PoolCall, Pooled, Truncation, check_num_inputs, embedding_of
from tgi_asgi.api.vectors import as_json, best_first, check_dimensions, shape_vector
from tgi_asgi.errors import (
    ContextExceeded,
    ModelLoadError,
    ModelNotSupported,
    Overloaded,
    TooManyPrompts,
    Unavailable,
)
from tgi_asgi.model_info import Embedding


def _status(error: BaseException) -> int:
    """Return TEI's status: 413 for inputs that are too long or too many, 424 for what the model cannot do."""
    if isinstance(error, ContextExceeded | TooManyPrompts):
        return 413
    return 424 if isinstance(error, ModelNotSupported) else NATIVE.status(error)


def _envelope(error: BaseException) -> dict[str, Any]:
    """Return TEI's error, whose types have other names than TGI's."""
    kind = "Backend"
    if isinstance(error, Overloaded):
        kind = "Overloaded"
    elif isinstance(error, Unavailable | ModelLoadError):
        kind = "Unhealthy"
    elif rule_of(error).type == "invalid_request_error" and not isinstance(error, ModelNotSupported):
        kind = "Validation"
    return {**NATIVE.envelope(error), "error_type": kind}


TEI = Dialect(_envelope, _status, NATIVE.names, is_json_only=True)
Side = Literal["left", "right", "Left", "Right"]


class EmbedRequest(Struct, kw_only=True):
    """The body of `POST /embed`."""

    inputs: str | list[str | int | list[int]]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Side | None = None
    prompt_name: str | None = None
    dimensions: Positive | None = None


class TeiRerankRequest(Struct, kw_only=True):
    """The body of TEI's `POST /rerank`."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Side | None = None


class _Keys(Struct):
    texts: msgspec.Raw = msgspec.Raw(b"null")


_EMBED = msgspec.json.Decoder(EmbedRequest)
_RERANK = msgspec.json.Decoder(TeiRerankRequest)
_KEYS = msgspec.json.Decoder(_Keys)


def parse_embed(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request for embeddings; the answer is an array of them."""
    request = decode_json(body, _EMBED)
    check_ranges(request)
    info = exchange.context.ready().info
    embedding = embedding_of(info)
    check_dimensions(request.dimensions, embedding)
    prompt = prompt_of(request.prompt_name, "prompt_name", embedding)
    inputs = [
        Input(prompt + each.content, each.where) if isinstance(each.content, str) else each
        for each in inputs_of(request.inputs, "inputs", info, exchange.context.settings)
    ]
    is_normalized = request.normalize is not False

    def answer(pooled: Pooled) -> bytes:
        vectors = [
            shape_vector(vector, request.dimensions, is_normalized=is_normalized) for vector in pooled.vectors
        ]
        return b"[" + b",".join(map(as_json, vectors)) + b"]"

    return PoolCall(
        inputs=inputs,
        how=embedding,
        answer=answer,
        truncation=truncation_of(request.truncate, request.truncation_direction),
    )


def parse_tei_rerank(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request to rank texts; the answer is an array."""
    request = decode_json(body, _RERANK)
    texts = request.texts
    check_num_inputs(len(texts), "texts", exchange.context.settings)
    scored = Scored(exchange.context.ready().info, request.query, texts, ("query", "texts"))

    def answer(pooled: Pooled) -> bytes:
        scores = scored.scores(pooled, is_raw=request.raw_scores is True)
        shown = [
            {
                "index": index,
                "score": scores[index],
                **({"text": texts[index]} if request.return_text else {}),
            }
            for index in best_first(scores)
        ]
        return orjson.dumps(shown)

    truncation = truncation_of(request.truncate, request.truncation_direction)
    return PoolCall(
        inputs=scored.inputs(),
        how=scored.how,
        answer=answer,
        truncation=truncation,
    )


def parse_either_rerank(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse TEI's request if it has `texts`, otherwise the other APIs'."""
    if bytes(decode_json(body, _KEYS).texts) == b"null":
        return parse_rerank(body, exchange)
    exchange.dialect = TEI
    exchange.require_json()
    return parse_tei_rerank(body, exchange)


def prompt_of(name: str | None, where: str, embedding: Embedding) -> str:
    """Return what the model's files put before a text under this name; no name: nothing."""
    if name is None:
        return ""
    if name not in embedding.prompts:
        known = ", ".join(sorted(embedding.prompts)) or "none"
        refuse_field(where, f"must be one of the model's prompts ({known})")
    return embedding.prompts[name]


def truncation_of(truncate: bool | None, side: Side | None) -> Truncation | None:
    """Return how TEI's fields cut inputs that are too long; None: not at all."""
    return Truncation(from_left=side in ("left", "Left")) if truncate else None
