"""`/rerank`, as in Cohere, Jina and vLLM, and vLLM's `/score`: relevance of documents to a query."""

from __future__ import annotations

import time
from secrets import token_hex

import msgspec
import orjson
from msgspec import Struct

from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.openai.pool_request import PoolRequest, usage
from tgi_asgi.api.parse import Natural, check_ranges, decode_json, refuse_field
from tgi_asgi.api.pool_call import Input, Pair, PoolCall, Pooled, check_num_inputs, scoring_of
from tgi_asgi.api.vectors import best_first, cosine, logit_of, probability
from tgi_asgi.model_info import Embedding, ModelInfo

_Texts = str | list[str]
# vLLM's names for the two sides of a score; the first are its oldest.
_SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


class Document(Struct):
    """A document given as an object."""

    text: str


class RerankRequest(PoolRequest, kw_only=True):
    """Body of `POST /rerank`, `/v1/rerank` and `/v2/rerank`."""

    query: str | Document
    documents: list[str | Document]
    top_n: Natural | None = None  # 0: all
    return_documents: bool | None = None  # unless false, the answer contains them
    instruction: str | None = None
    use_activation: bool | None = None  # false: scores are logits


class ScoreRequest(PoolRequest, kw_only=True):
    """Body of `POST /score` and `/v1/score`: `text_1` and `text_2`, or another pair of `_SIDES`."""

    text_1: _Texts | None = None
    text_2: _Texts | None = None
    queries: _Texts | None = None
    documents: _Texts | None = None
    items: _Texts | None = None
    data_1: _Texts | None = None
    data_2: _Texts | None = None
    instruction: str | None = None
    use_activation: bool | None = None  # false: scores are logits


_RERANK = msgspec.json.Decoder(RerankRequest)
_SCORE = msgspec.json.Decoder(ScoreRequest)


def parse_rerank(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request to rank documents."""
    request = decode_json(body, _RERANK)
    check_ranges(request)
    check_num_inputs(len(request.documents), "documents", exchange.context.settings)
    documents = [each if isinstance(each, str) else each.text for each in request.documents]
    query = request.query if isinstance(request.query, str) else request.query.text
    scored = Scored(exchange.context.ready().info, query, documents, ("query", "documents"))

    def answer(pooled: Pooled) -> bytes:
        scores = scored.scores(pooled, is_raw=request.use_activation is False)
        results = []
        for index in best_first(scores, request.top_n or None):
            entry: dict[str, object] = {"index": index, "relevance_score": scores[index]}
            if request.return_documents is not False:
                entry["document"] = {"text": documents[index]}
            results.append(entry)
        units = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        shown = {
            "id": f"rerank-{token_hex(16)}",
            "model": pooled.model,
            "usage": usage(pooled.num_tokens),
            "results": results,
            "meta": units,
        }
        return orjson.dumps(shown)

    return request.call(scored.inputs(request.instruction), scored.how, answer)


def parse_score(body: bytes, exchange: Exchange) -> PoolCall:
    """Parse a request to score pairs of texts."""
    request = decode_json(body, _SCORE)
    check_ranges(request)
    names = _sides(request)
    first, second = (getattr(request, name) for name in names)
    num_first, num_second = len(_texts(first)), len(_texts(second))
    for name, count in zip(names, (num_first, num_second), strict=True):
        check_num_inputs(count, name, exchange.context.settings)
    if num_first not in (1, num_second):
        refuse_field(names[0], f"must be one text, or as many as `{names[1]}`: {num_first}, {num_second}")
    scored = Scored(exchange.context.ready().info, first, second, names)

    def answer(pooled: Pooled) -> bytes:
        scores = scored.scores(pooled, is_raw=request.use_activation is False)
        shown = {
            "id": f"score-{token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": pooled.model,
            "data": [{"index": at, "object": "score", "score": each} for at, each in enumerate(scores)],
            "usage": usage(pooled.num_tokens),
        }
        return orjson.dumps(shown)

    return request.call(scored.inputs(request.instruction), scored.how, answer)


def _sides(request: ScoreRequest) -> tuple[str, str]:
    """Return the names that a request has for the two sides; refuse it if one is missing."""
    names = max(_SIDES, key=lambda names: sum(getattr(request, name) is not None for name in names))
    for name in names:
        if getattr(request, name) is None:
            refuse_field(name, "is required")
    return names


class Scored:
    """Pairs of texts, scored by the model itself or else by the cosine of their embeddings.

    Args:
        first: A text, a list of one, or as many as `second` has.
        names: The API's field names for both.
    """

    def __init__(self, info: ModelInfo, first: _Texts, second: _Texts, names: tuple[str, str]) -> None:
        self.how = scoring_of(info)
        self._first, self._second, self._names = _texts(first), _texts(second), names
        self._are_lists = isinstance(first, list), isinstance(second, list)

    def inputs(self, instruction: str | None = None) -> list[Input]:
        """Return the inputs: pairs, or for embeddings the first texts followed by the second ones."""
        first = [(text, self._where(0, at)) for at, text in enumerate(self._first)]
        second = [(text, self._where(1, at)) for at, text in enumerate(self._second)]
        for text, where in (*first, *second):
            if not text:
                refuse_field(where, "must not be empty")
        if isinstance(self.how, Embedding):
            return [Input(text, where) for text, where in (*first, *second)]
        own = [text for text, _ in first] * (len(second) if len(first) == 1 else 1)
        return [
            Input(Pair(query, document, instruction), where)
            for query, (document, where) in zip(own, second, strict=True)
        ]

    def scores(self, pooled: Pooled, *, is_raw: bool = False) -> list[float]:
        """Return a score per pair: 0 to 1, any number if raw, or for embeddings a cosine from -1 to 1."""
        vectors = pooled.vectors
        if isinstance(self.how, Embedding):
            count = len(self._first)
            first = vectors[:count] * (len(self._second) if count == 1 else 1)
            return [cosine(a, b) for a, b in zip(first, vectors[count:], strict=True)]
        logits = [logit_of(vector) for vector in vectors]
        return logits if is_raw else [probability(logit) for logit in logits]

    def _where(self, side: int, at: int) -> str:
        return f"{self._names[side]}[{at}]" if self._are_lists[side] else self._names[side]


def _texts(given: _Texts) -> list[str]:
    return [given] if isinstance(given, str) else given
