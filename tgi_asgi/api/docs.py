"""The API's description: `/api-doc/openapi.json` for programs, `/docs` for people.

It is made from the route table and from the very structs that requests are decoded with, so it cannot drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

import tgi_asgi
from tgi_asgi.api.errors import NATIVE, OPENAI, Dialect
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.limits import Limits
from tgi_asgi.api.routes import Access, Route
from tgi_asgi.api.tgi import schema as tgi_schema
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.types import ModelInfo

Schema = dict[str, Any]

_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>tgi-asgi</title>
<style>body{font:15px/1.6 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
td{padding:.1em 1.5em .1em 0}</style><h1>tgi-asgi</h1>
<p>Every field is in the <a href=api-doc/openapi.json>OpenAPI document</a>.</p><table>"""


async def openapi_json(exchange: Exchange) -> None:
    """Answer with the OpenAPI document."""
    context = exchange.context
    settings = context.settings
    needs_key = bool(settings.api_key or settings.api_key_file is not None)
    await exchange.respond_json(document(context.routes, settings, context.info, needs_key=needs_key))


async def page(exchange: Exchange) -> None:
    """Answer with a table of the routes: without scripts, for a browser has no key to fetch more with."""
    rows = [
        f"<tr><td>{row.tag}<td>{row.method}<td><code>{escape(row.path)}</code><td>{escape(row.summary)}"
        for row in exchange.context.routes
        if row.summary
    ]
    await exchange.respond(200, (_PAGE + "\n".join(rows)).encode(), b"text/html; charset=utf-8")


def document(
    routes: Sequence[Route], settings: Settings, info: ModelInfo | None, *, needs_key: bool
) -> Schema:
    """Return the OpenAPI 3.1 document; with `info`, the limits in it are those that hold."""
    documented = [
        row for row in routes if row.summary and (row.access is not Access.ADMIN or settings.admin_api_key)
    ]
    types: list[Any] = [tgi_schema.ErrorResponse, tgi_schema.SimpleToken, tgi_schema.TokenCount]
    for row in documented:
        types += [*row.requests, *filter(None, (row.response, row.event))]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    if info is not None:
        _put_limits(components, Limits.of(settings, is_tgi=True), info)
    paths: dict[str, Schema] = {}
    for row in documented:
        path = row.path.replace(":path}", "}")
        paths.setdefault(path, {})[row.method.lower()] = _operation(row, path, needs_key)
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


def _operation(row: Route, path: str, needs_key: bool) -> Schema:
    result: Schema = {
        "operationId": f"{row.method.lower()}{path}".replace("/", "_").strip("_"),
        "summary": row.summary,
        "tags": [row.tag],
        "responses": _responses(row),
    }
    if row.requests:
        result["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _any_of(row.requests)}},
        }
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        result["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if row.access is Access.ADMIN or (needs_key and row.access is Access.KEY):
        result["security"] = [{"key": []}]
    return result


def _responses(row: Route) -> Schema:
    content: Schema = {}
    if row.media_type == "application/json":
        schema: Schema = {} if row.response is None else _reference(row.response)
        content[row.media_type] = {"schema": {"type": "array", "items": schema} if row.is_list else schema}
    elif row.media_type:
        content[row.media_type] = {"schema": {"type": "string"}}
    if row.streams:
        data: Schema = {"type": "string"}
        if row.event is not None:
            schema = _reference(row.event)
            data |= {"contentMediaType": "application/json", "contentSchema": schema}
        event = {"type": "object", "required": ["data"], "properties": {"data": data}}
        is_sse = row.stream_type == "text/event-stream"
        content[row.stream_type] = {"schema": event if is_sse else {"type": "string"}}
    answered: Schema = {"description": "Answered"}
    if content:
        answered["content"] = content
    error = {
        "description": "Refused or failed",
        "content": {"application/json": {"schema": _error(row)}},
    }
    return {"200": answered, "4XX": error, "5XX": error}


def _error(row: Route) -> Schema:
    if row.is_by_key:
        return {"anyOf": [_envelope(NATIVE), _envelope(OPENAI)]}
    return _envelope(row.dialect)


def _envelope(dialect: Dialect) -> Schema:
    """Return the schema of a dialect's errors, by the example of one."""
    if dialect is NATIVE:
        return _reference(tgi_schema.ErrorResponse)
    return _like(dialect.envelope(InvalidRequest("")))


def _like(value: object) -> Schema:
    if isinstance(value, dict):
        properties = {name: _like(each) for name, each in value.items()}
        return {"type": "object", "required": list(properties), "properties": properties}
    return {"type": ["string", "null"]} if value is None else {"type": "string"}


def _any_of(types: tuple[type, ...]) -> Schema:
    schemas = [_reference(each) for each in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _reference(kind: type) -> Schema:
    if not issubclass(kind, msgspec.Struct):
        return {"type": "object"}
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _put_limits(components: Schema, limits: Limits, info: ModelInfo) -> None:
    """Replace TGI's default bounds by this server's."""
    fields = components["GenerateParameters"]["properties"]
    fields["best_of"]["maximum"] = limits.best_of
    fields["stop"]["maxItems"] = limits.stops
    fields["top_n_tokens"]["maximum"] = limits.top_logprobs
    fields["truncate"]["maximum"] = info.max_input_tokens
