"""TEI's routes, and other APIs' rerank routes, which share a path with it."""

from __future__ import annotations

from functools import partial

from tgi_asgi.api.errors import OPENAI
from tgi_asgi.api.openai.ranking import RerankRequest
from tgi_asgi.api.pooled import pooling
from tgi_asgi.api.routes import Route
from tgi_asgi.api.tei.request import TEI, EmbedRequest, TeiRerankRequest, parse_either_rerank, parse_embed


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
        rank("/rerank", summary="Rank documents: Cohere, Jina, vLLM; TEI by its `texts`", requests=kinds),
        rank("/v1/rerank", summary="The same", requests=kinds),
        rank("/v2/rerank", summary="The same", requests=kinds),
    ]  # fmt: skip
