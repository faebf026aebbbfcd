"""One line a request, with its numbers as fields, and nothing in it that a client could forge."""

from __future__ import annotations

import logging

import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app
from tgi_asgi.errors import ModelLoadError

LOGGER = "tgi_asgi.http.access_log"


async def test_an_answer_is_logged_with_its_sizes_and_times(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(scripted_app(ScriptedEngine(say("a", "b")))) as client:
        response = await client.post("/generate", json={"inputs": "hi"}, headers={"x-request-id": "req-7"})
    assert response.headers["x-request-id"] == "req-7"
    [record] = caplog.records
    assert record.getMessage() == "POST /generate 200"
    fields = record.__dict__
    assert (fields["request_id"], fields["status"]) == ("req-7", 200)
    assert (fields["prompt_tokens"], fields["generated_tokens"]) == (2, 3)
    times = ("total_ms", "validation_ms", "queue_ms", "inference_ms", "first_token_ms")
    assert all(fields[name] >= 0 for name in times)


async def test_a_refusal_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(scripted_app(ScriptedEngine())) as client:
        await client.post("/generate", json={"inputs": ""})
    [record] = caplog.records
    assert record.getMessage() == "POST /generate 422"
    assert "cannot be empty" in record.__dict__["error"]


async def test_probes_are_logged_only_when_they_fail(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    app = scripted_app(ScriptedEngine())
    async with client_of(app) as client:
        for path in ("/health", "/ping", "/metrics", "/"):
            await client.get(path)
        app.context.served = None  # loading
        await client.get("/health")
        assert caplog.records == []
        app.context.failure = ModelLoadError("no such file")
        await client.get("/health")
    assert [record.getMessage() for record in caplog.records] == ["GET /health 503"]


async def test_a_path_cannot_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(scripted_app(ScriptedEngine())) as client:
        await client.get("/x%0aPOST /generate 200")
    [record] = caplog.records
    assert "\n" not in record.getMessage()
    assert "\n" not in record.__dict__["error"]
