"""`/api/embed`, and the older `/api/embeddings` for a single prompt."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.ollama.request import model_of
from tgi_asgi.api.parse import Positive, check_ranges, decode_json, refuse_field
from tgi_asgi.api.pool_call import Input, PoolCall, Pooled, Truncation, check_num_inputs, embedding_of
from tgi_asgi.api.vectors import as_json, check_dimensions, shape_vector
from tgi_asgi.observe.summary import RequestSummary


class OllamaEmbed(Struct, kw_only=True):
    """Body of `POST /api/embed`; without an input it asks to load the model."""

    model: str | None = None
    input: str | list[str] | None = None
    truncate: bool | None = None  # unless false, inputs that are too long are cut
    dimensions: Positive | None = None
    options: dict[str, Any] | None = None


class OllamaEmbeddings(Struct, kw_only=True):
    """Body of `POST /api/embeddings`."""

    model: str | None = None
    prompt: str | None = None
    options: dict[str, Any] | None = None


_EMBED = msgspec.json.Decoder(OllamaEmbed)
_EMBEDDINGS = msgspec.json.Decoder(OllamaEmbeddings)


def parse_embed(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request for the embeddings, normalised to length 1, of one or more texts."""
    request = decode_json(body, _EMBED)
    check_ranges(request)
    embedding = embedding_of(exchange.context.ready().info)
    check_dimensions(request.dimensions, embedding)
    texts = [request.input] if isinstance(request.input, str) else request.input or []
    if texts and texts != [""]:
        check_num_inputs(len(texts), "input", exchange.context.settings)
    else:
        texts = []
    is_list = not isinstance(request.input, str)
    inputs = [Input(text, f"input[{at}]" if is_list else "input") for at, text in enumerate(texts)]
    for given in inputs:
        if not given.content:
            refuse_field(given.where, "must not be empty")

    def answer(pooled: Pooled) -> bytes:
        summary = RequestSummary.of(exchange)
        vectors = [shape_vector(each, request.dimensions, is_normalized=True) for each in pooled.vectors]
        shown = {
            "total_duration": int(summary.total_s * 1e9),
            "load_duration": int((summary.validation_s + summary.queue_s) * 1e9),
            "prompt_eval_count": pooled.num_tokens,
        }
        head = orjson.dumps({"model": pooled.model})[:-1]
        tail = orjson.dumps(shown)[1:]
        return b'%b,"embeddings":[%b],%b' % (head, b",".join(map(as_json, vectors)), tail)

    return PoolCall(
        inputs=inputs,
        how=embedding,
        answer=answer,
        model=model_of(request.model, exchange),
        truncation=None if request.truncate is False else Truncation(),
    )


def parse_embeddings(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request for the embedding of one text, normalised if the model's files say so."""
    request = decode_json(body, _EMBEDDINGS)
    check_ranges(request)
    embedding = embedding_of(exchange.context.ready().info)

    def answer(pooled: Pooled) -> bytes:
        vectors = [shape_vector(each, None, is_normalized=embedding.is_normalized) for each in pooled.vectors]
        return b'{"embedding":%b}' % (as_json(vectors[0]) if vectors else b"[]")

    inputs = [Input(request.prompt, "prompt")] if request.prompt else []
    model = model_of(request.model, exchange)
    return PoolCall(inputs=inputs, how=embedding, answer=answer, model=model, truncation=Truncation())
