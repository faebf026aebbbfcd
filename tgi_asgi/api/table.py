"""Every route of the server: path, handler, dialect, who may call it, what the documents say of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tgi_asgi.api import docs
from tgi_asgi.api.admin import control, status
from tgi_asgi.api.anthropic import request as messages
from tgi_asgi.api.anthropic import routes as anthropic
from tgi_asgi.api.anthropic.render import ANTHROPIC
from tgi_asgi.api.errors import OPENAI, Dialect
from tgi_asgi.api.life import Parse, generating
from tgi_asgi.api.ollama import routes as ollama
from tgi_asgi.api.openai import chat, completions, models, response_input, responses
from tgi_asgi.api.openai.schema import ChatRequest, CompletionRequest
from tgi_asgi.api.routes import Access, Handler, Route
from tgi_asgi.api.tgi import clouds, generate, schema, tokenize
from tgi_asgi.settings import Settings

CHAT = Dialect("chat", OPENAI.envelope, names={"prompt": "messages"}, nests_tools=True)


def routes(settings: Settings) -> list[Route]:
    """Return the routes that a server with these settings has."""
    rows = [*_tgi(), *_openai(), *_anthropic(), *ollama.rows(), *_server(), *_admin()]
    # Requests have lost their trailing slash by the time they are routed.
    for path, twin in ((settings.aip_predict_route, "/vertex"), (settings.aip_health_route, "/health")):
        if path:
            [row] = [row for row in rows if row.path == twin]
            rows.append(replace(row, path=path.rstrip("/"), summary=""))
    if settings.debug_endpoints:
        rows.append(Route("GET", "/debug/engine", status.engine))
    return rows


def _generates(
    path: str, parse: Parse | Handler, summary: str, tag: str, requests: tuple[type, ...], **more: Any
) -> Route:
    handle = more.pop("handle", None) or generating(parse)  # type: ignore[arg-type]
    return Route("POST", path, handle, summary, tag, generates=True, requests=requests, **more)


def _tgi() -> list[Route]:
    events = {"streams": True, "event": schema.StreamResponse}
    return [
        _generates(
            "/", generate.parse_root, "Generate; the body says whether to stream", "TGI",
            (schema.CompatGenerateRequest,), response=schema.GenerateResponse, is_list=True, **events,
        ),
        _generates(
            "/generate", generate.parse_generate, "Generate", "TGI", (schema.GenerateRequest,),
            response=schema.GenerateResponse,
        ),
        _generates(
            "/generate_stream", generate.parse_generate_stream, "Generate, an event a token", "TGI",
            (schema.GenerateRequest,), media_type="", **events,
        ),
        _generates(
            "/invocations", clouds.invocations, "SageMaker: POST /, chat or completions", "Clouds",
            (schema.CompatGenerateRequest, ChatRequest, CompletionRequest),
            handle=clouds.invocations, streams=True, is_by_key=True,
        ),
        _generates(
            "/vertex", clouds.parse_vertex, "Vertex AI: several requests at once", "Clouds",
            (schema.VertexRequest,), response=schema.VertexResponse,
        ),
        Route(
            "POST", "/tokenize", tokenize.tokenize, "Tokens of a text or chat", "Tokens",
            requests=(schema.TokenizeRequest, schema.PromptTokenizeRequest, ChatRequest), is_by_key=True,
        ),
        Route(
            "POST", "/detokenize", tokenize.detokenize, "Text of tokens", "Tokens", OPENAI,
            requests=(schema.DetokenizeRequest,), response=schema.DetokenizeResponse,
        ),
        Route(
            "POST", "/chat_tokenize", tokenize.chat_tokenize, "A chat's templated text and tokens", "Tokens",
            requests=(ChatRequest,), response=schema.ChatTokenizeResponse,
        ),
        Route("GET", "/tokenizer_info", status.tokenizer_info, "Special tokens and chat template", "Tokens"),
        Route("GET", "/info", status.info, "The model and the limits", response=schema.Info),
    ]  # fmt: skip


def _openai() -> list[Route]:
    return [
        _generates(
            "/v1/chat/completions", chat.parse_chat, "Chat", "OpenAI", (ChatRequest,), dialect=CHAT,
            streams=True,
        ),
        _generates(
            "/v1/completions", completions.parse_completion, "Text", "OpenAI", (CompletionRequest,),
            dialect=OPENAI, streams=True,
        ),
        _generates(
            "/v1/responses", responses.parse_response, "Responses", "OpenAI",
            (response_input.ResponsesRequest,), handle=responses.create, dialect=responses.RESPONSES,
            streams=True,
        ),
        Route(
            "GET", "/v1/responses/{response}", responses.retrieve, "A response that is kept", "OpenAI",
            OPENAI,
        ),
        Route("DELETE", "/v1/responses/{response}", responses.delete, "Forget a response", "OpenAI", OPENAI),
        Route("GET", "/v1/models", models.list_models, "List the served model", "OpenAI", OPENAI),
        Route(
            "GET", "/v1/models/{model:path}", models.retrieve_model, "Describe a served model", "OpenAI",
            OPENAI,
        ),
    ]  # fmt: skip


def _anthropic() -> list[Route]:
    return [
        _generates(
            "/v1/messages", messages.parse_messages, "Anthropic's messages", "Anthropic",
            (messages.MessagesRequest,), handle=anthropic.messages, dialect=ANTHROPIC, streams=True,
        ),
        Route(
            "POST", "/v1/messages/count_tokens", anthropic.count_tokens, "Length of a prompt", "Anthropic",
            ANTHROPIC, requests=(messages.CountRequest,),
        ),
    ]  # fmt: skip


def _server() -> list[Route]:
    def probe(path: str, handle: Handler, summary: str, media_type: str = "") -> Route:
        return Route("GET", path, handle, summary, access=Access.OPEN, is_quiet=True, media_type=media_type)

    return [
        probe("/", status.health, "Whether requests can be served, for TGI's clients"),
        probe("/health", status.health, "Whether requests can be served"),
        probe("/ping", status.health, "The same, for SageMaker"),
        probe("/livez", status.live, "Whether the process is alive"),
        probe("/readyz", status.ready, "Whether requests should be sent here"),
        probe("/metrics", status.metrics, "Prometheus metrics", "text/plain"),
        Route("GET", "/docs", docs.page, "This document, to read", media_type="text/html"),
        Route("GET", "/api-doc/openapi.json", docs.openapi_json, "This document"),
    ]


def _admin() -> list[Route]:
    def admin(path: str, handle: Handler, summary: str, *requests: type) -> Route:
        return Route("POST", path, handle, summary, "Admin", access=Access.ADMIN, requests=requests)

    return [
        admin("/abort_request", control.abort_request, "End a request", control.AbortRequest),
        admin("/reset_prefix_cache", control.reset_prefix_cache, "Forget all prompts"),
        admin("/log_level", control.log_level, "Log from another level on", control.LogLevel),
    ]
