"""The API's description: `/api-doc/openapi.json` for programs, `/docs` for people."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from starlette.routing import Route

from tgi_asgi.http.exchange import Exchange
from tgi_asgi.http.openapi import OPERATIONS, Operation, document
from tgi_asgi.http.routing import route

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "summary{cursor:pointer;padding:.3em 0}code,pre{font:13px/1.4 ui-monospace,monospace}"
    "b{display:inline-block;width:3.5em}pre{background:#8881;padding:1em;overflow:auto}"
    "table{border-collapse:collapse}td{padding:.2em .8em .2em 0;vertical-align:top}"
)


def routes() -> list[Route]:
    """Return the two routes."""
    return [route("/docs", get=docs), route("/api-doc/openapi.json", get=openapi_json)]


async def openapi_json(exchange: Exchange) -> None:
    """Answer with the OpenAPI document."""
    await exchange.reply_json(_document(exchange))


async def docs(exchange: Exchange) -> None:
    """Answer with the document as a page without scripts: a browser has no key to fetch it with."""
    page = render(_document(exchange))
    await exchange.reply(200, page.encode(), b"text/html; charset=utf-8")


def render(description: dict[str, Any]) -> str:
    """Return the page of a document made by `openapi.document`."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>tgi-asgi</title>",
        f"<style>{_STYLE}</style><h1>tgi-asgi {escape(description['info']['version'])}</h1>",
        f"<p>{escape(description['info']['description'])} ",
        "<a href=/api-doc/openapi.json>OpenAPI document</a></p>",
    ]
    schemas = description["components"]["schemas"]
    for tag in dict.fromkeys(operation.tag for operation in OPERATIONS):
        parts.append(f"<h2>{escape(tag)}</h2>")
        parts += [_section(each, schemas) for each in OPERATIONS if each.tag == tag]
    parts.append("<h2>Schemas</h2>")
    for name, schema in sorted(schemas.items()):
        body = escape(json.dumps(schema, indent=2))
        parts.append(
            f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
            f"<pre>{body}</pre></details>"
        )
    return "".join(parts)


def _document(exchange: Exchange) -> dict[str, Any]:
    context = exchange.context
    settings = context.settings
    return document(
        settings, context.info, needs_key=bool(settings.api_key or settings.api_key_file is not None)
    )


def _section(operation: Operation, schemas: dict[str, Any]) -> str:
    title = (
        f"<summary><b>{operation.method.upper()}</b> <code>{escape(operation.path)}</code> "
        f"{escape(operation.summary)}</summary>"
    )
    tables = [_fields(kind.__name__, schemas) for kind in operation.requests if kind.__name__ in schemas]
    return f"<details>{title}{''.join(tables)}</details>"


def _fields(name: str, schemas: dict[str, Any]) -> str:
    schema = schemas[name]
    required = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{escape(field)}</code>{' *' if field in required else ''}</td>"
        f"<td>{escape(_kind(each))}</td><td>{escape(each.get('description', ''))}</td></tr>"
        for field, each in schema.get("properties", {}).items()
    ]
    return f'<p><a href="#{escape(name)}">{escape(name)}</a></p><table>{"".join(rows)}</table>'


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = schema.get("type", "any")
    return f"array of {_kind(schema['items'])}" if kind == "array" and "items" in schema else str(kind)
