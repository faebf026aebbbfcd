"""Every route of the server: path, handler, dialect, access, and documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tgi_asgi.api import docs
from tgi_asgi.api.admin import adapters, control, status
from tgi_asgi.api.anthropic import models as anthropic_models
from tgi_asgi.api.anthropic import routes as anthropic
from tgi_asgi.api.anthropic.render import ANTHROPIC
from tgi_asgi.api.errors import CHAT, OPENAI, Dialect
from tgi_asgi.api.life import Parse, generating
from tgi_asgi.api.ollama import routes as ollama
from tgi_asgi.api.openai import conversations
from tgi_asgi.api.openai import stored_responses as stored
from tgi_asgi.api.openai.chat import parse_chat
from tgi_asgi.api.openai.classify import ClassifyRequest, parse_classify
from tgi_asgi.api.openai.completions import parse_completion
from tgi_asgi.api.openai.embeddings import EmbeddingRequest, parse_embeddings
from tgi_asgi.api.openai.ranking import ScoreRequest, parse_score
from tgi_asgi.api.openai.response_schema import (
    ConversationRequest,
    ConversationUpdate,
    NewItems,
    ResponsesRequest,
)
from tgi_asgi.api.openai.responses import RESPONSES, count_input, parse_compaction, parse_response
from tgi_asgi.api.openai.schema import ChatRequest, CompletionRequest
from tgi_asgi.api.page.files import Pages
from tgi_asgi.api.pooled import pooling
from tgi_asgi.api.route_traits import Access
from tgi_asgi.api.routes import Route
from tgi_asgi.api.tei import routes as tei
from tgi_asgi.api.tei.tokenize import TeiTokenizeRequest, tei_tokenize_or
from tgi_asgi.api.tgi import routes as tgi
from tgi_asgi.api.tgi.tokenize import tokenize
from tgi_asgi.api.tokenising import tokenising
from tgi_asgi.settings import Settings


def routes(settings: Settings) -> list[Route]:
    """Return the routes of a server with these settings."""
    rows = [*_tgi(), *_openai(), *tei.rows(), *anthropic.rows(), *ollama.rows(), *_server()]
    if settings.web_pages:
        rows = _with_pages(rows)
    # Paths are routed without their trailing slash.
    for path, twin in ((settings.aip_predict_route, "/vertex"), (settings.aip_health_route, "/health")):
        if path:
            [row] = [row for row in rows if row.path == twin]
            rows.append(replace(row, path=path.rstrip("/"), summary=""))
    if settings.admin_api_key:
        rows += _admin()
    if settings.debug_endpoints:
        rows.append(Route("GET", "/debug/engine", status.engine))
    rows.append(Route("GET", "/api-doc/openapi.json", docs.openapi_json(rows), "This document"))
    return rows


def _tgi() -> list[Route]:
    """Return TGI's routes; models that do not generate have TEI's at the root and for SageMaker."""
    shared = ("/", "/invocations")
    rows = []
    for row in tgi.rows():
        if row.path in shared and row.method == "POST":
            row = replace(row, handle=tei.tei_or(row.handle))
        elif row.path == "/tokenize":
            kinds = (*row.requests, TeiTokenizeRequest)
            row = replace(row, handle=tokenising(tei_tokenize_or(tokenize)), requests=kinds)
        rows.append(row)
    return rows


def _openai() -> list[Route]:
    row = partial(Route, tag="OpenAI", dialect=OPENAI)
    shared = partial(row, other_dialect=ANTHROPIC)
    listed = partial(anthropic_models.in_own_form, list_models=status.models_of)

    def made(path: str, parse: Parse, summary: str, kind: type, dialect: Dialect = OPENAI) -> Route:
        handle, kinds = generating(parse), (kind,)
        return row("POST", path, handle, summary, dialect=dialect, requests=kinds, generates=True, event=str)

    pooled = partial(row, "POST", tag="Embeddings", generates=True)
    return [
        made("/v1/chat/completions", parse_chat, "Chat", ChatRequest, CHAT),
        made("/v1/completions", parse_completion, "Text", CompletionRequest),
        made("/v1/responses", parse_response, "Responses", ResponsesRequest, RESPONSES),
        pooled("/v1/embeddings", pooling(parse_embeddings), "Embeddings", requests=(EmbeddingRequest,)),
        pooled("/v1/score", pooling(parse_score), "Score pairs of texts: vLLM", requests=(ScoreRequest,)),
        pooled("/score", pooling(parse_score), "The same, without /v1", requests=(ScoreRequest,)),
        pooled("/v1/classify", pooling(parse_classify), "Classify texts: vLLM", requests=(ClassifyRequest,)),
        pooled("/classify", pooling(parse_classify), "The same, without /v1", requests=(ClassifyRequest,)),
        row(
            "POST", "/v1/responses/input_tokens", tokenising(count_input), "Length of a prompt",
            dialect=RESPONSES, requests=(ResponsesRequest,),
        ),
        row(
            "POST", "/v1/responses/compact", generating(parse_compaction), "Summarise a conversation",
            dialect=RESPONSES, requests=(ResponsesRequest,), generates=True,
        ),
        row("POST", "/v1/responses/{response}/cancel", stored.cancel, ""),  # refused with the reason
        row("GET", "/v1/responses/{response}/input_items", stored.list_input, "The input of a response"),
        row("GET", "/v1/responses/{response}", stored.retrieve, "A stored response"),
        row("DELETE", "/v1/responses/{response}", stored.delete, "Delete a response"),
        *_conversations(row),
        shared("GET", "/v1/models", listed(status.list_models), "List the served model"),
        shared("GET", "/v1/models/{model:path}", listed(status.retrieve_model), "Describe a served model"),
    ]  # fmt: skip


def _conversations(row: Callable[..., Route]) -> list[Route]:
    path = "/v1/conversations"
    one, items = f"{path}/{{conversation}}", f"{path}/{{conversation}}/items"
    item = f"{items}/{{item}}"
    begin = partial(row, needs_body=False)  # OpenAI's SDK for JavaScript can send none
    return [
        begin("POST", path, conversations.create, "Begin a conversation", requests=(ConversationRequest,)),
        row("GET", one, conversations.retrieve, "A conversation"),
        row("POST", one, conversations.update, "Change its metadata", requests=(ConversationUpdate,)),
        row("DELETE", one, conversations.delete, "Delete it"),
        row("POST", items, conversations.add_items, "Add items to it", requests=(NewItems,)),
        row("GET", items, conversations.list_items, "Its items"),
        row("GET", item, conversations.retrieve_item, "One of them"),
        row("DELETE", item, conversations.delete_item, "Delete one"),
    ]


def _server() -> list[Route]:
    probe = partial(Route, "GET", access=Access.OPEN, is_quiet=True, response=None)
    return [
        probe("/", status.health, "Whether requests can be served, for TGI's clients"),
        probe("/health", status.health, "Whether requests can be served"),
        probe("/ping", status.health, "The same, for SageMaker"),
        probe("/livez", status.live, "Whether the process is alive"),
        probe("/readyz", status.ready, "Whether requests should be sent here"),
        probe("/metrics", status.metrics, "Prometheus metrics", response=str, media_type="text/plain"),
    ]


def _with_pages(rows: list[Route]) -> list[Route]:
    """Return the routes with the web pages; at the root, browsers get the chat page."""
    pages = Pages()
    shown = partial(Route, "GET", access=Access.OPEN, is_quiet=True, response=str, media_type="text/html")
    return [
        *(
            replace(row, handle=pages.chat_or(row.handle)) if (row.method, row.path) == ("GET", "/") else row
            for row in rows
        ),
        replace(
            shown("/docs", pages.docs, "This document as a page, with forms to try requests"),
            access=Access.BROWSER,
        ),
        shown("/page/{name}", pages.file, "A file of the pages", media_type="text/javascript"),
    ]


def _admin() -> list[Route]:
    row = partial(Route, "POST", tag="Admin", access=Access.ADMIN)
    dialect = replace(OPENAI, is_json_only=True)
    text = partial(row, dialect=dialect, response=str, media_type="text/plain")
    return [
        row("/abort_request", control.abort_request, "End a request", requests=(control.AbortRequest,)),
        row("/reset_prefix_cache", control.reset_prefix_cache, "Drop all cached prompts"),
        row("/log_level", control.log_level, "Change the log level", requests=(control.LogLevel,)),
        text("/v1/load_lora_adapter", adapters.load, "Load an adapter", requests=(adapters.LoadAdapter,)),
        text("/v1/unload_lora_adapter", adapters.unload, "Unload one", requests=(adapters.UnloadAdapter,)),
    ]
