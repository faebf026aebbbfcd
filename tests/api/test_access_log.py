"""The access log: one line per request, with its numbers as fields, and nothing that a client could forge."""

from __future__ import annotations

import logging

import pytest

from tests.support.client import client_of
from tests.support.fake_runner import FakeRunner
from tests.support.scripted_engine import (
    Script,
    ScriptedEngine,
    fail_with,
    say,
    scripted_app,
    toy_info,
)
from tests.support.toy_tokenizer import ToyTokenizer
from tgi_asgi.api.served import Served
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import GenerationFailed, ModelLoadError, RequestAborted
from tgi_asgi.settings import Settings

LOGGER = "tgi_asgi.observe.access_log"


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
    assert (fields["request_id"], fields["client"], fields["status"]) == ("req-7", "127.0.0.1", 200)
    assert (fields["prompt_tokens"], fields["cached_tokens"], fields["generated_tokens"]) == (2, 0, 3)
    times = ("total_ms", "validation_ms", "queue_ms", "inference_ms", "first_token_ms")
    assert all(fields[name] >= 0 for name in times)


async def test_a_refusal_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(scripted_app(ScriptedEngine())) as client:
        await client.post("/generate", json={"inputs": ""})
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("INFO", "POST /generate 422")
    assert "cannot be empty" in record.__dict__["error"]


async def test_a_model_without_a_chat_template_is_not_said_to_have_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(scripted_app(ScriptedEngine(), chat_template=None)) as client:
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        response = await client.post("/v1/chat/completions", json=chat)
    assert "--chat-template and a .jinja file" in response.json()["error"]["message"]
    [record] = caplog.records
    assert record.__dict__["error"] == "no chat template, or it refused the messages"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
async def test_a_failure_of_the_server_is_an_error(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a stream that has begun with a 200, too."""
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(scripted_app(ScriptedEngine(fail_with(GenerationFailed("why"))))) as client:
        await client.post(path, json={"inputs": "hi", "prompt": "hi"})
    [record] = caplog.records
    assert (record.levelname, record.__dict__["error"]) == ("ERROR", "why")


async def test_an_abort_by_the_administrator_is_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(
        scripted_app(ScriptedEngine(fail_with(RequestAborted("by an administrator"))))
    ) as client:
        await client.post("/generate", json={"inputs": "hi"})
    [record] = caplog.records
    assert (record.levelname, record.__dict__["status"]) == ("INFO", 500)


async def test_probes_are_logged_only_when_they_fail(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    app = scripted_app(ScriptedEngine())
    async with client_of(app) as client:
        for path in ("/health", "/ping", "/metrics", "/"):
            await client.get(path)
        app.context.served = None  # the model is loading
        await client.get("/health")
        assert caplog.records == []
        app.context.failure = ModelLoadError("no such file")
        await client.get("/health")
    assert [record.getMessage() for record in caplog.records] == ["GET /health 503"]


async def test_a_path_cannot_forge_a_line_or_a_field(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with client_of(scripted_app(ScriptedEngine())) as client:
        await client.get("/x%0aPOST /generate 200 status=200")
        await client.get("/y=z")
    assert [record.getMessage() for record in caplog.records] == [
        r'GET "/x\nPOST /generate 200 status=200" 404',
        'GET "/y=z" 404',
    ]


async def test_the_way_of_a_request_is_in_its_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    runner = FakeRunner()
    engine = Engine(runner, ToyTokenizer(), Settings(), toy_info())
    engine.start()
    app = scripted_app(ScriptedEngine(), Settings(api_key=("k",)))
    served = Served(engine, ToyTokenizer(), None, toy_info(), engine.stats)  # type: ignore[arg-type]
    app.context.served = served
    async with client_of(app) as client:
        body = {"prompt": "hi", "max_tokens": 3, "n": 2}
        await client.post("/v1/completions", json=body, headers={"authorization": "Bearer k"})
    await engine.stop()
    [record] = caplog.records
    fields = record.__dict__
    assert (fields["finish"], fields["tenant"]) == ("length,length", "key 1")
    assert fields["prefill_ms"] + fields["decode_ms"] == pytest.approx(fields["inference_ms"], abs=0.2)


@pytest.mark.parametrize(
    ("script", "body"),
    [
        (say("a"), {}),
        (fail_with(GenerationFailed("why")), {}),
        (say("a"), {"temperature": 9}),
        (say("a"), {"max_tokens": 10**6}),
        (say("a"), {"messages": [{"role": "assistant", "content": "SECRET"}] * 2}),
        (say("a"), {"messages": [{"role": "user", "content": [{"type": "text"}, "SECRET"]}]}),
        (say("a"), {"messages": [{"role": "user", "content": "SECRET" * 1000}]}),
    ],
)
async def test_what_clients_write_is_in_no_log_line(
    caplog: pytest.LogCaptureFixture, script: Script, body: dict[str, object]
) -> None:
    caplog.set_level(logging.DEBUG)
    template = (
        "{% if messages|length > 1 %}{{ raise_exception(messages[1].content) }}{% endif %}{{ messages }}"
    )
    app = scripted_app(ScriptedEngine(script), chat_template=template)
    async with client_of(app) as client:
        messages = [{"role": "user", "content": "SECRET"}]
        for is_stream in (False, True):
            request = {"messages": messages, "stream": is_stream, **body}
            await client.post("/v1/chat/completions", json=request)
    assert caplog.records
    for record in caplog.records:
        assert "SECRET" not in record.getMessage()
        assert "SECRET" not in str(record.__dict__)
