"""The OpenAPI document, made from the very structs that requests are decoded with, so it cannot drift.

A test holds the operations listed here against the app's routes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import msgspec

import tgi_asgi
from tgi_asgi.http import messages_request, openai_schema, responses_request, tgi_schema
from tgi_asgi.http.tgi_validation import NativeLimits
from tgi_asgi.settings import Settings
from tgi_asgi.types import ModelInfo

Schema = dict[str, Any]


class Errors(enum.Enum):
    """Whose envelope a route's errors come in."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    BY_KEY = "by key"  # that of the kind of request that the body is


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path, as the document describes it.

    Attributes:
        requests: the types that the body may have.
        response: of a 200, where it is a struct; else any JSON object (or none, for `is_empty`).
        is_list: the response is an array of `response`.
        streams: it answers with server-sent events, where the request asks for them.
        event: the JSON of one of those, where it is a struct.
        errors: whose envelope errors come in.
        media_type: of a response that is not JSON.
    """

    method: str
    path: str
    summary: str
    tag: str
    requests: tuple[type, ...] = ()
    response: type | None = None
    is_list: bool = False
    streams: bool = False
    event: type | None = None
    errors: Errors = Errors.NATIVE
    is_open: bool = False  # needs no key
    media_type: str = "application/json"


_GENERATE = tgi_schema.GenerateRequest
_CHAT = openai_schema.ChatRequest
_COMPLETION = openai_schema.CompletionRequest

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "post", "/", "Generate; the body says whether to stream", "TGI", (tgi_schema.CompatGenerateRequest,),
        tgi_schema.GenerateResponse, is_list=True, streams=True, event=tgi_schema.StreamResponse,
    ),
    Operation("post", "/generate", "Generate", "TGI", (_GENERATE,), tgi_schema.GenerateResponse),
    Operation(
        "post", "/generate_stream", "Generate, an event a token", "TGI", (_GENERATE,),
        streams=True, event=tgi_schema.StreamResponse, media_type="",
    ),
    Operation("post", "/v1/chat/completions", "Chat", "OpenAI", (_CHAT,), streams=True, errors=Errors.OPENAI),
    Operation(
        "post", "/v1/completions", "Text", "OpenAI", (_COMPLETION,), streams=True, errors=Errors.OPENAI,
    ),
    Operation(
        "post", "/v1/messages", "Anthropic's messages", "Anthropic", (messages_request.MessagesRequest,),
        streams=True, errors=Errors.ANTHROPIC,
    ),
    Operation(
        "post", "/v1/messages/count_tokens", "Length of a prompt", "Anthropic",
        (messages_request.CountRequest,), errors=Errors.ANTHROPIC,
    ),
    Operation(
        "post", "/v1/responses", "Responses, stateless", "OpenAI", (responses_request.ResponsesRequest,),
        streams=True, errors=Errors.OPENAI,
    ),
    Operation("get", "/v1/models", "List the served model", "OpenAI", errors=Errors.OPENAI),
    Operation("get", "/v1/models/{model}", "Describe a served model", "OpenAI", errors=Errors.OPENAI),
    Operation(
        "post", "/tokenize", "Tokens of a text or chat", "Tokens",
        (tgi_schema.TokenizeRequest, tgi_schema.PromptTokenizeRequest, _CHAT), errors=Errors.BY_KEY,
    ),
    Operation(
        "post", "/detokenize", "Text of tokens", "Tokens", (tgi_schema.DetokenizeRequest,),
        tgi_schema.DetokenizeResponse, errors=Errors.OPENAI,
    ),
    Operation(
        "post", "/chat_tokenize", "A chat's templated text and tokens", "Tokens", (_CHAT,),
        tgi_schema.ChatTokenizeResponse,
    ),
    Operation("get", "/tokenizer_info", "Special tokens and chat template", "Tokens"),
    Operation(
        "post", "/invocations", "SageMaker: POST /, chat or completions", "Clouds",
        (tgi_schema.CompatGenerateRequest, _CHAT, _COMPLETION), streams=True, errors=Errors.BY_KEY,
    ),
    Operation(
        "post", "/vertex", "Vertex AI: several requests at once", "Clouds", (tgi_schema.VertexRequest,),
        tgi_schema.VertexResponse,
    ),
    Operation("get", "/info", "The model and the limits", "Server", response=tgi_schema.Info),
    Operation("get", "/health", "Whether requests can be served", "Server", is_open=True, media_type=""),
    Operation("get", "/ping", "The same, for SageMaker", "Server", is_open=True, media_type=""),
    Operation("get", "/", "The same, for TGI's clients", "Server", is_open=True, media_type=""),
    Operation("get", "/metrics", "Prometheus metrics", "Server", is_open=True, media_type="text/plain"),
    Operation("get", "/docs", "This document, to read", "Server", media_type="text/html"),
    Operation("get", "/api-doc/openapi.json", "This document", "Server"),
)  # fmt: skip


def document(settings: Settings, info: ModelInfo | None, *, needs_key: bool) -> Schema:
    """Return the OpenAPI 3.1 document; with `info`, the limits in it are those that hold."""
    types: list[Any] = [tgi_schema.ErrorResponse, tgi_schema.SimpleToken, tgi_schema.TokenCount]
    for operation in OPERATIONS:
        types += [*operation.requests, *filter(None, (operation.response, operation.event))]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    if info is not None:
        _put_limits(components, NativeLimits.of(settings, info))
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, needs_key)
    result: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "tgi-asgi",
            "description": "Text generation: the API of Text Generation Inference, and OpenAI's.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "version": tgi_asgi.__version__,
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return result


def _operation(operation: Operation, needs_key: bool) -> Schema:
    result: Schema = {
        "operationId": f"{operation.method}{operation.path}".replace("/", "_").strip("_"),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(operation),
    }
    if operation.requests:
        result["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _any_of(operation.requests)}},
        }
    if "{model}" in operation.path:
        result["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if needs_key and not operation.is_open:
        result["security"] = [{"key": []}]
    return result


def _responses(operation: Operation) -> Schema:
    content: Schema = {}
    if operation.media_type == "application/json":
        schema: Schema = {} if operation.response is None else _reference(operation.response)
        content[operation.media_type] = {
            "schema": {"type": "array", "items": schema} if operation.is_list else schema
        }
    elif operation.media_type:
        content[operation.media_type] = {"schema": {"type": "string"}}
    if operation.streams:
        data: Schema = {"type": "string"}
        if operation.event is not None:
            schema = _reference(operation.event)
            data |= {"contentMediaType": "application/json", "contentSchema": schema}
        event = {"type": "object", "required": ["data"], "properties": {"data": data}}
        content["text/event-stream"] = {"schema": event}
    answered: Schema = {"description": "Answered"}
    if content:
        answered["content"] = content
    error = {
        "description": "Refused or failed",
        "content": {"application/json": {"schema": _error(operation.errors)}},
    }
    return {"200": answered, "4XX": error, "5XX": error}


def _error(errors: Errors) -> Schema:
    if errors is Errors.BY_KEY:
        return {"anyOf": [_error(Errors.NATIVE), _error(Errors.OPENAI)]}
    if errors is Errors.NATIVE:
        return _reference(tgi_schema.ErrorResponse)
    text = {"type": "string"}
    if errors is Errors.ANTHROPIC:
        told = {"type": text, "message": text}
        error = {"type": "object", "required": list(told), "properties": told}
        properties = {"type": {"const": "error"}, "error": error}
        return {"type": "object", "required": list(properties), "properties": properties}
    optional = {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": optional, "code": optional}
    inner = {"type": "object", "required": list(fields), "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": inner}}


def _any_of(types: tuple[type, ...]) -> Schema:
    schemas = [_reference(each) for each in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _reference(kind: type) -> Schema:
    if not issubclass(kind, msgspec.Struct):
        return {"type": "object"}
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _put_limits(components: Schema, limits: NativeLimits) -> None:
    """Replace TGI's default bounds by this server's."""
    fields = components["GenerateParameters"]["properties"]
    fields["best_of"]["maximum"] = limits.max_best_of
    fields["stop"]["maxItems"] = limits.max_stop_sequences
    fields["top_n_tokens"]["maximum"] = limits.max_top_n_tokens
    fields["truncate"]["maximum"] = limits.max_input_tokens
