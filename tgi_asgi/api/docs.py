"""The API's description, `/api-doc/openapi.json`, which the page at `/docs` shows.

It is generated from the route table and the structs that decode requests, so it cannot drift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import orjson

import tgi_asgi
from tgi_asgi.api.asgi import JSON
from tgi_asgi.api.context import ServerContext
from tgi_asgi.api.errors import NATIVE, OPENAI
from tgi_asgi.api.exchange import Exchange, Handler
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.parse import without_refused
from tgi_asgi.api.route_traits import Access
from tgi_asgi.api.routes import Route
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.model_info import ModelInfo

Schema = dict[str, Any]


def openapi_json(rows: Sequence[Route]) -> Handler:
    """Return a handler that answers with the OpenAPI document of these routes."""

    async def handle(exchange: Exchange) -> None:
        context = exchange.context
        # Describing every type takes 30 ms.
        body = await context.text_threads.run(lambda: orjson.dumps(_document(rows, context)))
        await exchange.respond(200, body)

    return handle


def _document(rows: Sequence[Route], context: ServerContext) -> Schema:
    """Return the OpenAPI 3.1 document; once the model has loaded, it has the actual limits."""
    settings = context.settings
    needs_key = bool(settings.api_key or settings.api_key_file is not None)
    documented = [row for row in rows if row.summary]
    kinds = [kind for row in documented for kind in (*row.requests, row.response, row.event)]
    found, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components = {name: without_refused(schema) for name, schema in components.items()}
    schemas = dict(zip(kinds, found, strict=True))
    if context.info is not None:
        _put_limits(components, Limits.of(settings, is_tgi=True), context.info)
    paths: dict[str, Schema] = {}
    for row in documented:
        path = row.path.replace(":path}", "}")
        paths.setdefault(path, {})[row.method.lower()] = _operation(row, path, schemas, needs_key)
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
    if needs_key or settings.admin_api_key:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return result


def _operation(row: Route, path: str, schemas: Mapping[Any, Schema], needs_key: bool) -> Schema:
    content = {}
    if row.response is not None:
        content[row.media_type] = {"schema": schemas[row.response]}
    if row.event is not None:
        content[row.stream_type] = {"schema": _stream(row, schemas[row.event])}
    # The schema is taken from an example error; several kinds of request have one each.
    dialects = (NATIVE, OPENAI) if len(row.requests) > 1 else (row.dialect,)
    envelope = _any_of([_like(dialect.body(InvalidRequest(""), "")) for dialect in dialects])
    error = {"description": "Refused or failed", "content": {JSON.decode(): {"schema": envelope}}}
    result: Schema = {
        "operationId": f"{row.method.lower()}{path}".replace("/", "_").strip("_"),
        "summary": row.summary,
        "tags": [row.tag],
        "responses": {"200": {"description": "Answered", "content": content}, "4XX": error, "5XX": error},
    }
    if row.requests:
        body = {"schema": _any_of([schemas[kind] for kind in row.requests])}
        result["requestBody"] = {"required": row.needs_body, "content": {JSON.decode(): body}}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        result["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if row.access is Access.ADMIN or (needs_key and row.access is not Access.OPEN):
        result["security"] = [{"key": []}]
    return result


def _stream(row: Route, event: Schema) -> Schema:
    """Return the schema of a stream's line, or of a server-sent event."""
    if row.stream_type != "text/event-stream":
        return event
    if row.event is not str:
        event = {"type": "string", "contentMediaType": JSON.decode(), "contentSchema": event}
    return {"type": "object", "required": ["data"], "properties": {"data": event}}


def _like(value: object) -> Schema:
    if isinstance(value, dict):
        properties = {name: _like(each) for name, each in value.items()}
        return {"type": "object", "required": list(properties), "properties": properties}
    return {"type": ["string", "null"]} if value is None else {"type": "string"}


def _any_of(schemas: Sequence[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _put_limits(components: Schema, limits: Limits, info: ModelInfo) -> None:
    """Replace TGI's default bounds with this server's."""
    fields = components["GenerateParameters"]["properties"]
    fields["best_of"]["maximum"] = limits.best_of
    fields["stop"]["maxItems"] = limits.stops
    fields["top_n_tokens"]["maximum"] = limits.top_logprobs
    fields["truncate"]["maximum"] = info.max_input_tokens
