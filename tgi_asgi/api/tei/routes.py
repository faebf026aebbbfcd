"""TEI's routes, and other APIs' routes that share a path with one of them."""

from __future__ import annotations

from functools import partial

from tgi_asgi.api.errors import OPENAI
from tgi_asgi.api.exchange import Exchange, Handler
from tgi_asgi.api.openai.ranking import RerankRequest
from tgi_asgi.api.pooled import Parse, answer, pooling
from tgi_asgi.api.routes import Route
from tgi_asgi.api.tei.predict import Prediction, PredictRequest, parse_predict
from tgi_asgi.api.tei.request import (
    TEI,
    EmbedRequest,
    TeiRerankRequest,
    parse_either_rerank,
    parse_embed,
    parse_tei_rerank,
)
from tgi_asgi.api.tei.similarity import SimilarityRequest, parse_similarity
from tgi_asgi.model_info import ModelInfo


def rows() -> list[Route]:
    """Return the routes."""
    row = partial(Route, "POST", tag="Embeddings", generates=True)
    rank = partial(row, handle=pooling(parse_either_rerank), dialect=OPENAI)
    kinds = (RerankRequest, TeiRerankRequest)
    return [
        row(
            "/embed", pooling(parse_embed), "Embed texts: TEI", dialect=TEI, requests=(EmbedRequest,),
            response=list[list[float]],
        ),
        row(
            "/similarity", pooling(parse_similarity), "Compare a text with others: TEI", dialect=TEI,
            requests=(SimilarityRequest,), response=list[float],
        ),
        row(
            "/predict", pooling(parse_predict), "Classify texts: TEI", dialect=TEI,
            requests=(PredictRequest,), response=list[Prediction | list[Prediction]],
        ),
        rank("/rerank", summary="Rank documents: Cohere, Jina, vLLM; TEI by its `texts`", requests=kinds),
        rank("/v1/rerank", summary="The same", requests=kinds),
        rank("/v2/rerank", summary="The same", requests=kinds),
    ]  # fmt: skip


def tei_or(handle: Handler) -> Handler:
    """Return the handler of a path whose meaning depends on the model; `handle` is of those that generate."""

    async def either(exchange: Exchange) -> None:
        parse = _parse_of(exchange.context.ready().info)
        if parse is None:
            await handle(exchange)
            return
        exchange.dialect = TEI
        exchange.require_json()
        await answer(exchange, parse)

    return either


def _parse_of(info: ModelInfo) -> Parse | None:
    """Return the parser of the model's task; a classifier with one label ranks, as in TEI."""
    if info.generates:
        return None
    if info.embedding is not None:
        return parse_embed
    if info.classification is not None and len(info.classification.labels) > 1:
        return parse_predict
    return None if info.scoring is None else parse_tei_rerank
