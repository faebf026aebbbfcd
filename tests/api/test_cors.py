"""CORS: preflights without keys, answers that browsers may read, and no headers unless configured."""

from __future__ import annotations

import httpx
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.settings import Settings

PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


async def call(method: str, settings: Settings, headers: dict[str, str]) -> httpx.Response:
    async with client_of(scripted_app(ScriptedEngine(), settings)) as client:
        content = b'{"inputs": "x"}' if method == "POST" else None
        return await client.request(
            method, "/generate", headers={"content-type": "application/json", **headers}, content=content
        )


def cors_headers(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith("access-control")}


async def test_nothing_is_sent_unless_the_administrator_names_origins() -> None:
    response = await call("POST", Settings(), {"origin": "https://app.example"})
    assert cors_headers(response) == {}
    assert (await call("OPTIONS", Settings(), PREFLIGHT)).status_code == 405


async def test_a_preflight_needs_no_key_and_allows_what_it_asks_for() -> None:
    settings = Settings(api_key=("k",), cors_allow_origin=("https://app.example",))
    response = await call("OPTIONS", settings, PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]


async def test_refusals_can_be_read_as_well() -> None:
    # Browsers send it in lower case.
    settings = Settings(api_key=("k",), cors_allow_origin=("HTTPS://App.example/",))
    response = await call("POST", settings, {"origin": "https://app.example"})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "https://app.example"


async def test_another_origin_gets_no_leave() -> None:
    settings = Settings(cors_allow_origin=("https://app.example",))
    response = await call("POST", settings, {"origin": "https://evil.example"})
    assert cors_headers(response) == {}
    assert response.headers["vary"] == "origin"


@pytest.mark.parametrize("settings", [Settings(cors_allow_origin=("*",)), Settings(tgi_compat=True)], ids=str)
async def test_a_star_allows_any_origin(settings: Settings) -> None:
    response = await call("POST", settings, {"origin": "https://any.example"})
    assert response.headers["access-control-allow-origin"] == "*"
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "request-id", "retry-after", "x-should-retry"} <= set(exposed)


async def test_streams_can_be_read_as_well() -> None:
    settings = Settings(cors_allow_origin=("*",))
    async with client_of(scripted_app(ScriptedEngine(), settings)) as client:
        response = await client.post("/generate_stream", json={"inputs": "x"})
    assert response.headers["access-control-allow-origin"] == "*"


async def test_header_names_that_are_none_are_not_echoed() -> None:
    settings = Settings(cors_allow_origin=("*",))
    response = await call("OPTIONS", settings, {**PREFLIGHT, "access-control-request-headers": "a;b(c)"})
    assert response.headers["access-control-allow-headers"].startswith("authorization")
