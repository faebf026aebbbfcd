"""TGI's routes, including those that cloud platforms call by their own names."""

from __future__ import annotations

from functools import partial

from tgi_asgi.api.admin import status
from tgi_asgi.api.errors import OPENAI
from tgi_asgi.api.life import generating
from tgi_asgi.api.openai.schema import ChatRequest, ChatTokenizeRequest, CompletionRequest
from tgi_asgi.api.routes import Route
from tgi_asgi.api.tgi import clouds, request, schema, tokenize
from tgi_asgi.api.tokenising import tokenising


def rows() -> list[Route]:
    """Return the routes."""
    row = partial(Route, "POST", generates=True, tag="TGI", response=schema.GenerateResponse)
    cloud = partial(Route, "POST", generates=True, tag="Clouds")
    tokens = partial(Route, "POST", tag="Tokens")
    streamed = generating(partial(request.parse_generate, is_stream=True))
    return [
        row(
            "/", generating(request.parse_root), "Generate; the body says whether to stream",
            requests=(schema.CompatGenerateRequest,), response=list[schema.GenerateResponse],
            event=schema.StreamResponse,
        ),
        row(
            "/generate", generating(request.parse_generate), "Generate", requests=(schema.GenerateRequest,)
        ),
        row(
            "/generate_stream", streamed, "Generate, one event per token", requests=(schema.GenerateRequest,),
            response=None, event=schema.StreamResponse,
        ),
        cloud(
            "/invocations", generating(clouds.parse_invocation), "SageMaker: POST /, chat or completions",
            requests=(schema.CompatGenerateRequest, ChatRequest, CompletionRequest), event=str,
        ),
        cloud(
            "/vertex", generating(clouds.parse_vertex), "Vertex AI: several requests at once",
            requests=(schema.VertexRequest,), response=dict[str, list[str]],
        ),
        tokens(
            "/tokenize", tokenising(tokenize.tokenize), "Tokenise a text or chat",
            requests=(schema.TokenizeRequest, schema.PromptTokenizeRequest, ChatTokenizeRequest),
        ),
        tokens(
            "/detokenize", tokenising(tokenize.detokenize), "Convert tokens to text", dialect=OPENAI,
            requests=(schema.DetokenizeRequest,), response=dict[str, str],
        ),
        tokens(
            "/chat_tokenize", tokenising(tokenize.chat_tokenize), "A chat's templated text and tokens",
            requests=(ChatRequest,), response=schema.ChatTokenizeResponse,
        ),
        Route("GET", "/tokenizer_info", status.tokenizer_info, "Special tokens and chat template", "Tokens"),
        Route("GET", "/info", status.info, "The model and the limits"),
    ]  # fmt: skip
