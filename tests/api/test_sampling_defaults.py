"""Sampling values that requests leave out: the model's, unless the route has TGI's own rules."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, scripted_app, toy_info
from tgi_asgi.settings.sampling import NO_DEFAULTS, SamplingDefaults
from tgi_asgi.types import SamplingParams

HI = [{"role": "user", "content": "hi"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 5, "model": "tgi"},
    "/api/chat": {"messages": HI, "stream": False},
}
RECOMMENDED = SamplingDefaults(
    temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, typical_p=0.9, repetition_penalty=1.05
)
NAMES = tuple(RECOMMENDED.given())


async def sampled(
    path: str,
    body: dict[str, Any],
    defaults: SamplingDefaults = RECOMMENDED,
    *,
    suppressed: tuple[int, ...] = (),
) -> SamplingParams:
    engine = ScriptedEngine()
    app = scripted_app(engine, info=toy_info(sampling=defaults, suppressed_ids=suppressed))
    async with client_of(app) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return engine.requests[0].sampling


@pytest.mark.parametrize("path", PATHS)
async def test_a_request_gets_what_the_model_recommends(path: str) -> None:
    given = await sampled(path, PATHS[path])
    assert {name: getattr(given, name) for name in NAMES} == RECOMMENDED.given()


@pytest.mark.parametrize("path", PATHS)
async def test_what_a_request_says_wins_and_null_says_nothing(path: str) -> None:
    values: dict[str, Any] = {"temperature": 1, "top_p": None}
    body = PATHS[path] | ({"options": values} if path == "/api/chat" else values)
    given = await sampled(path, body)
    assert (given.temperature, given.top_p, given.top_k) == (1.0, 0.95, 20)


async def test_tgis_own_route_keeps_tgis_rules() -> None:
    bare = await sampled("/generate", {"inputs": "hi"})
    assert (bare.temperature, bare.top_k, bare.repetition_penalty) == (1.0, 0, 1.0)
    greedy = await sampled("/generate", {"inputs": "hi", "parameters": {}})
    assert greedy.temperature == 0.0


async def test_ollamas_defaults_fill_what_the_model_leaves_open() -> None:
    given = await sampled("/api/chat", PATHS["/api/chat"], SamplingDefaults(temperature=0.3))
    assert (given.temperature, given.top_k, given.top_p) == (0.3, 40, 0.9)


@pytest.mark.parametrize(
    ("defaults", "temperature", "top_p"), [(RECOMMENDED, 0.6, 0.95), (NO_DEFAULTS, 1.0, 1.0)]
)
async def test_a_response_says_what_it_was_sampled_with(
    defaults: SamplingDefaults, temperature: float, top_p: float
) -> None:
    app = scripted_app(ScriptedEngine(), info=toy_info(sampling=defaults))
    async with client_of(app) as client:
        plain = (await client.post("/v1/responses", json={"input": "hi"})).json()
        given = (await client.post("/v1/responses", json={"input": "hi", "temperature": 0.1})).json()
    assert (plain["temperature"], plain["top_p"]) == (temperature, top_p)
    assert (given["temperature"], given["top_p"]) == (0.1, top_p)


@pytest.mark.parametrize("path", [*PATHS, "/generate"])
async def test_no_request_samples_a_suppressed_token(path: str) -> None:
    body = PATHS.get(path, {"inputs": "hi"})
    if path.startswith(("/v1/chat", "/v1/completions")):
        body = body | {"logit_bias": {"98": 100, "97": 5}}
    bias = dict((await sampled(path, body, suppressed=(98, 99))).logit_bias)
    assert (bias[98], bias[99], bias.get(97, 5.0)) == (-100.0, -100.0, 5.0)
