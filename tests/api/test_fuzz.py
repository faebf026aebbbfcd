"""Random JSON, nearly valid and far from it: never a 500, a hang or a lost permit."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.asgi import events_of
from tests.support.fuzzing import post_and_check
from tests.support.scripted_engine import ScriptedEngine, give_vector, say, scripted_app, toy_info
from tgi_asgi.api.ollama.embed import OllamaEmbed
from tgi_asgi.api.openai.classify import ClassifyRequest
from tgi_asgi.api.openai.embeddings import EmbeddingRequest
from tgi_asgi.api.openai.ranking import RerankRequest, ScoreRequest
from tgi_asgi.api.openai.schema import ChatRequest, CompletionRequest
from tgi_asgi.api.tei.predict import PredictRequest
from tgi_asgi.api.tei.request import EmbedRequest, TeiRerankRequest
from tgi_asgi.api.tei.similarity import SimilarityRequest
from tgi_asgi.model_info import Activation, Classification, Embedding, Scoring
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling, PoolingKind

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 30), st.floats(allow_nan=False),
    st.floats(-3, 3), st.text(max_size=8),
    st.sampled_from(["", "user", "assistant", "system", "text", "auto", "none", "tgi"]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "refusal", "image_url"])}, optional={
    "text": st.text(max_size=5) | SCALARS, "refusal": SCALARS,
})  # fmt: skip
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "x"])},
    optional={
        "content": st.text(max_size=8) | st.lists(PARTS, max_size=3) | SCALARS,
        "name": SCALARS, "tool_call_id": st.text(max_size=3), "tool_calls": ANYTHING, "reasoning": SCALARS,
    },
)  # fmt: skip


def bodies(kind: type[msgspec.Struct], required: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Return requests in which up to four known fields hold arbitrary values."""
    names = sorted({field.name for field in msgspec.structs.fields(kind)} - set(required))
    given_fields = st.dictionaries(st.sampled_from(names), ANYTHING | SCALARS, max_size=4)
    return st.builds(lambda own, fields: {**fields, **own}, st.fixed_dictionaries(required), given_fields)


CHATS = bodies(ChatRequest, {"messages": st.lists(MESSAGES, max_size=3) | ANYTHING})
COMPLETIONS = bodies(
    CompletionRequest,
    {
        "prompt": st.text(max_size=5)
        | st.lists(st.text(max_size=3) | st.integers(-1, 1100), max_size=3)
        | ANYTHING
    },
)
APPS = st.sampled_from([Settings(), Settings(tgi_compat=True), Settings(strict_model_names=True)])


async def post(app_settings: Settings, path: str, body: Any) -> None:
    engine = ScriptedEngine(say("Hel", "lo", b"\xf0\x9f"))
    app = scripted_app(engine, app_settings)
    call = await post_and_check(app, engine, path, body)
    if call.headers["content-type"].startswith("text/event-stream"):
        assert events_of(call.content)[-1] == "[DONE]"
    else:
        assert ("error" in call.json()) == (call.status >= 400)


@settings(max_examples=150)
@given(APPS, CHATS)
def test_random_chats(app_settings: Settings, body: Any) -> None:
    asyncio.run(post(app_settings, "/v1/chat/completions", body))


@settings(max_examples=150)
@given(APPS, COMPLETIONS)
def test_random_completions(app_settings: Settings, body: Any) -> None:
    asyncio.run(post(app_settings, "/v1/completions", body))


TEXTS = st.lists(st.text(max_size=5) | st.integers(-1, 1100) | ANYTHING, max_size=4) | st.text(max_size=5)
VECTORS = {
    "/v1/embeddings": bodies(EmbeddingRequest, {"input": TEXTS}),
    "/embed": bodies(EmbedRequest, {"inputs": TEXTS}),
    "/api/embed": bodies(OllamaEmbed, {"input": TEXTS}),
    "/rerank": bodies(RerankRequest, {"query": st.text(max_size=5) | ANYTHING, "documents": TEXTS}),
    "/v2/rerank": bodies(TeiRerankRequest, {"query": st.text(max_size=5), "texts": TEXTS}),
    "/similarity": bodies(
        SimilarityRequest, {"inputs": st.fixed_dictionaries({"source_sentence": TEXTS, "sentences": TEXTS})}
    ),
    "/predict": bodies(PredictRequest, {"inputs": TEXTS | st.lists(TEXTS, max_size=3)}),
    "/classify": bodies(ClassifyRequest, {"input": TEXTS}),
    "/score": bodies(ScoreRequest, {"text_1": TEXTS, "text_2": TEXTS}),
}
CLASSES = Classification(Pooling(PoolingKind.LOGITS, (0, 1)), 30, ("a", "b"), Activation.SOFTMAX)
MODELS = st.sampled_from(
    [
        {"embedding": Embedding(Pooling(PoolingKind.MEAN), 2, 30, prompts={"a": "b"})},
        {"scoring": Scoring(Pooling(PoolingKind.LOGITS, (0, 1)), 30), "generates": False},
        {"classification": CLASSES, "generates": False},
        {},
    ]
)


@settings(max_examples=250)
@given(
    st.sampled_from(list(VECTORS)).flatmap(lambda path: st.tuples(st.just(path), VECTORS[path] | ANYTHING)),
    MODELS,
)
def test_random_requests_for_vectors(asked: tuple[str, Any], model: dict[str, Any]) -> None:
    async def ask() -> None:
        engine = ScriptedEngine(give_vector(0.5, -2.0))
        app = scripted_app(engine, info=toy_info(**model))
        call = await post_and_check(app, engine, *asked)
        answer = call.json()
        assert (isinstance(answer, dict) and "error" in answer) == (call.status >= 400)
        assert model or call.status >= 400

    asyncio.run(ask())


@settings(max_examples=100)
@given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/responses"]),
    st.binary(max_size=60) | ANYTHING,
)
def test_random_bodies(path: str, body: Any) -> None:
    asyncio.run(post(Settings(), path, body))
