"""The OpenAPI document: it has every route and nothing else, and its bounds are the enforced ones."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.api import table
from tgi_asgi.api.route_traits import Access
from tgi_asgi.settings import Settings


async def document(**settings: Any) -> dict[str, Any]:
    async with client_of(scripted_app(ScriptedEngine(), Settings(**settings))) as client:
        response = await client.get("/api-doc/openapi.json", headers={"authorization": "Bearer k"})
    assert response.status_code == 200
    body: dict[str, Any] = response.json()
    return body


async def test_the_document_lists_exactly_the_routes() -> None:
    listed = {(method, path) for path, own in (await document())["paths"].items() for method in own}
    rows = table.routes(Settings())
    assert listed == {(row.method.lower(), row.path.replace(":path", "")) for row in rows if row.summary}
    assert {row.path for row in rows if not row.summary} == REFUSING


REFUSING = {"/v1/responses/{response}/cancel"}  # only to say why


async def test_admin_routes_are_told_of_only_where_they_can_be_called() -> None:
    paths = (await document(admin_api_key="k"))["paths"]
    admin = [row.path for row in table.routes(Settings(admin_api_key="k")) if row.access is Access.ADMIN]
    assert admin and all(paths[path]["post"]["security"] == [{"key": []}] for path in admin)


async def test_a_body_is_required_where_there_must_be_one() -> None:
    bodies = {
        (path, method): row["requestBody"]["required"]
        for path, own in (await document())["paths"].items()
        for method, row in own.items()
        if "requestBody" in row
    }
    assert {key for key, is_required in bodies.items() if not is_required} == {("/v1/conversations", "post")}
    async with client_of(scripted_app(ScriptedEngine())) as client:
        for (path, _), is_required in bodies.items():
            answer = await client.post(path, headers={"content-type": "application/json"})
            assert (answer.status_code == 200) == (not is_required), (path, answer.text)


async def test_every_reference_leads_somewhere() -> None:
    body = await document()

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            found = [node["$ref"]] if "$ref" in node else []
            return found + [ref for value in node.values() for ref in references(value)]
        return [ref for value in node for ref in references(value)] if isinstance(node, list) else []

    names = {ref.removeprefix("#/components/schemas/") for ref in references(body)}
    assert names <= set(body["components"]["schemas"])
    assert {"GenerateRequest", "GenerateParameters", "ChatRequest", "Message"} <= names


async def test_bounds_are_those_of_this_server() -> None:
    fields = (await document(max_stop_sequences=9, max_best_of=5, max_top_n_tokens=7))["components"][
        "schemas"
    ]["GenerateParameters"]["properties"]
    assert fields["stop"]["maxItems"] == 9
    assert fields["best_of"]["maximum"] == 5
    assert fields["top_n_tokens"]["maximum"] == 7
    assert fields["truncate"]["maximum"] == 511
    assert fields["temperature"]["exclusiveMinimum"] == 0
    assert (fields["frequency_penalty"]["minimum"], fields["frequency_penalty"]["maximum"]) == (-2, 2)


BEYOND = {
    "best_of": 3, "temperature": 0, "repetition_penalty": 0, "frequency_penalty": 2.5, "top_k": 0, "top_p": 1,
    "typical_p": 1, "max_new_tokens": 0, "stop": list("abcde"), "truncate": 0, "seed": -1, "top_n_tokens": 6,
}  # fmt: skip


async def test_every_bound_in_the_document_is_enforced() -> None:
    fields = (await document())["components"]["schemas"]["GenerateParameters"]["properties"]
    keywords = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxItems")
    bounded = {
        name
        for name, schema in fields.items()
        if any(key in part for part in (schema, *schema.get("anyOf", ())) for key in keywords)
    }
    assert bounded == set(BEYOND)
    async with client_of(scripted_app(ScriptedEngine())) as client:
        for name, value in BEYOND.items():
            response = await client.post("/generate", json={"inputs": "x", "parameters": {name: value}})
            assert response.status_code == 422, name


async def test_the_document_tells_of_keys_only_where_there_are_some() -> None:
    assert "securitySchemes" not in (await document())["components"]
    keyed = await document(api_key=("k",))
    assert keyed["paths"]["/generate"]["post"]["security"] == [{"key": []}]
    assert "security" not in keyed["paths"]["/health"]["get"]


@pytest.mark.parametrize("path", ["/docs", "/api-doc/openapi.json"])
async def test_the_documentation_is_there_while_the_model_loads(path: str) -> None:
    app = scripted_app(ScriptedEngine())
    app.context.served = None
    async with client_of(app) as client:
        assert (await client.get(path)).status_code == 200


async def test_fields_that_are_refused_are_not_offered() -> None:
    schemas = (await document())["components"]["schemas"]
    for name, refused in (
        ("ChatRequest", {"bad_words", "input_ids", "max_output_tokens"}),
        ("CompletionRequest", {"bad_words", "prompt_embeds", "max_new_tokens"}),
        ("ResponsesRequest", {"bad_words", "background", "max_tokens", "n", "documents"}),
    ):
        offered = schemas[name]["properties"].keys()
        assert "temperature" in offered and not refused & offered
        assert refused <= {field.name for field in msgspec.structs.fields(getattr(table, name))}
