"""The application around the routes: loading, failing, unknown paths, health."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.asgi import Call, request, send
from tests.support.scripted_engine import ScriptedEngine, scripted_app, toy_info
from tests.support.waiting import LONGEST_S
from tgi_asgi.api.asgi import Message
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.api.served import Served
from tgi_asgi.app import App, create_app
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.observe.summary import RequestSummary
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[None]:
    """Run an app's lifespan as a server does."""
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    outgoing: asyncio.Queue[Message] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan"}, incoming.get, outgoing.put))
    await incoming.put({"type": "lifespan.startup"})
    assert (await outgoing.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await incoming.put({"type": "lifespan.shutdown"})
        assert (await outgoing.get())["type"] == "lifespan.shutdown.complete"
        await task


async def test_the_port_answers_while_the_model_loads() -> None:
    engine = ScriptedEngine()
    may_finish, has_reported, is_ready = threading.Event(), threading.Event(), asyncio.Event()

    def load(settings: Settings, progress: Any) -> Served:
        progress("reading weights", 41, 100)
        has_reported.set()
        assert may_finish.wait(10)
        return Served(engine, engine.tokenizer, None, toy_info())  # type: ignore[arg-type]

    app = create_app(Settings(), load)
    app.on_ready = lambda served: is_ready.set()
    async with lifespan(app):
        await asyncio.to_thread(has_reported.wait, 10)
        health = await send(app, request("GET", "/health"))
        assert health.status == 503
        assert health.json() == {
            "error": "unhealthy", "error_type": "healthcheck", "state": "loading",
            "progress": {"stage": "reading weights", "done": 41, "total": 100},
        }  # fmt: skip
        assert int(health.headers["retry-after"]) >= 1
        refused = await send(app, request("POST", CHAT, HI))
        assert refused.status == 503
        assert "reading weights, 41%" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.body == []
        native = await send(app, request("POST", "/generate", {"inputs": "hi"}))
        assert (native.status, native.json()["error_type"]) == (503, "unavailable")
        may_finish.set()
        await asyncio.wait_for(is_ready.wait(), LONGEST_S)
        health = await send(app, request("GET", "/health"))
        assert (health.status, health.content) == (200, b"")
    assert engine.state is EngineState.DEAD


class PanicException(BaseException):
    """What a library written in Rust raises when it panics."""


@pytest.mark.parametrize(
    "failure", [ModelLoadError("model.gguf does not exist"), PanicException("no thread pool")]
)
async def test_a_failed_load_is_reported_and_keeps_health_at_503(failure: BaseException) -> None:
    reasons: asyncio.Queue[BaseException] = asyncio.Queue()

    def load(settings: Settings, progress: Any) -> Served:
        raise failure

    app = create_app(Settings(), load)
    app.on_fatal = reasons.put_nowait
    async with lifespan(app):
        assert str(await asyncio.wait_for(reasons.get(), LONGEST_S)) == str(failure)
        health = await send(app, request("GET", "/health"))
        assert (health.status, health.json()["state"]) == (503, "dead")
        assert (await send(app, request("POST", CHAT, HI))).status == 503


async def test_a_server_whose_threads_cannot_start_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    served = scripted_app(ScriptedEngine()).context.served
    assert served is not None
    reasons: asyncio.Queue[BaseException] = asyncio.Queue()
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("tgi-count"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    app = create_app(Settings(), lambda settings, progress: served)
    app.on_fatal = reasons.put_nowait
    async with lifespan(app):
        reason = str(await asyncio.wait_for(reasons.get(), LONGEST_S))
        assert reason.startswith("can't start new thread: too few threads are allowed here")
        assert (await send(app, request("GET", "/health"))).status == 503


async def test_a_panic_while_a_prompt_is_tokenised_is_an_error_of_that_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = ScriptedEngine()

    def encode(*args: Any, **kwargs: Any) -> list[int]:
        raise PanicException("index out of range")

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    app = scripted_app(engine)
    answer = await send(app, request("POST", CHAT, HI))
    assert (answer.status, answer.json()["error"]["type"]) == (500, "server_error")
    metrics = (await send(app, request("GET", "/metrics"))).content.decode()
    assert "tgi_request_success 0" in metrics
    assert 'tgi_request_failure{err="generation"} 1' in metrics


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/metrics", "/info", "/v1/responses/resp_1", "/nowhere"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_shared_caches_keep_no_answer(method: str, path: str) -> None:
    answer = await send(scripted_app(ScriptedEngine()), request(method, path))
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("state", [EngineState.DRAINING, EngineState.DEAD])
async def test_an_engine_that_drains_or_died_answers_503(state: EngineState) -> None:
    engine = ScriptedEngine()
    engine.state = state
    app = scripted_app(engine)
    for call in (request("GET", "/health"), request("GET", "/ping"), request("POST", CHAT, HI)):
        await send(app, call)
        assert call.status == 503
        assert int(call.headers["retry-after"]) >= 1
    assert engine.channels == []


@pytest.mark.parametrize("path", ["/v1/nope", "/v1", "/v1/images/edits", "/v1/audio/speech"])
async def test_unknown_v1_paths_get_openais_envelope(path: str) -> None:
    call = await send(scripted_app(ScriptedEngine()), request("POST", path, HI))
    assert call.status == 404
    assert call.json()["error"]["code"] == "unknown_url"
    assert call.body == []


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/models", "/models/x", "/responses"])
async def test_a_forgotten_v1_gets_a_hint(path: str) -> None:
    call = await send(scripted_app(ScriptedEngine()), request("POST", path, HI))
    assert call.status == 404
    error = call.json()["error"]
    assert error["code"] == "unknown_url"
    assert "/v1" + path in error["message"]


@pytest.mark.parametrize("path", ["/nope", "/generate/x", "/v3/models", "/v1x"])
async def test_other_unknown_paths_get_the_flat_envelope(path: str) -> None:
    call = await send(scripted_app(ScriptedEngine()), request("GET", path))
    assert call.status == 404
    assert call.json()["error_type"] == "not_found"


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/models/x", "/models"])
async def test_long_paths_are_not_sent_back_whole(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tgi_asgi")
    call = await send(scripted_app(ScriptedEngine()), request("GET", path + "x" * 5000))
    assert call.status == 404
    assert 150 < len(call.content) < 600
    assert caplog.messages
    assert max(map(len, caplog.messages)) < 600


async def test_wrong_methods_name_the_right_ones() -> None:
    app = scripted_app(ScriptedEngine())
    call = await send(app, request("GET", CHAT))
    assert (call.status, call.headers["allow"]) == (405, "POST")
    assert call.json()["error"]["code"] == "method_not_allowed"
    call = await send(app, request("DELETE", "/health"))
    assert (call.status, call.headers["allow"]) == (405, "GET, HEAD")
    assert call.json()["error_type"] == "method_not_allowed"


@pytest.mark.parametrize("target", ["http://x/v1/models", "https://x:3000/v1/models/", "http://x//v1/models"])
async def test_a_target_may_name_scheme_and_host(target: str) -> None:
    call = await send(scripted_app(ScriptedEngine()), request("GET", target))
    assert call.status == 200


async def test_a_trailing_slash_is_the_same_path() -> None:
    app = scripted_app(ScriptedEngine())
    assert (await send(app, request("POST", CHAT + "/", HI))).status == 200
    assert (await send(app, request("GET", "/v1/models/"))).json()["object"] == "list"


@pytest.mark.parametrize("root", ["/llm", "/llm/", "/v1"])
async def test_an_app_may_be_mounted_below_a_prefix(root: str) -> None:
    app, prefix = scripted_app(ScriptedEngine()), root.rstrip("/")

    async def answer(method: str, path: str) -> Call:
        call = request(method, prefix + path)
        call.scope["root_path"] = root
        return await send(app, call)

    for path in ("", "/", "/health", "/v1/models/", "/v1/models/toy/model", "/llm/health"):
        call = await answer("GET", path)
        assert call.status == (404 if path == "/llm/health" else 200), path
    assert (await answer("HEAD", "/health")).status == 200
    call = await answer("PUT", "/v1/chat/completions")
    assert (call.status, call.headers["allow"]) == (405, "POST")
    assert "base URL" not in (await answer("GET", "/v1/nothing")).json()["error"]["message"]
    assert "Take /openai from" in (await answer("GET", "/openai/v1/models")).json()["error"]["message"]


async def test_a_path_with_a_placeholder_for_its_parameter_is_an_ordinary_one() -> None:
    call = await send(scripted_app(ScriptedEngine()), request("GET", "/v1/responses/{response}"))
    assert (call.status, call.json()["error"]["code"]) == (404, "response_not_found")


async def test_compat_mode_speaks_tgis_envelope_on_v1() -> None:
    app = scripted_app(ScriptedEngine(), Settings(tgi_compat=True))
    call = await send(app, request("POST", CHAT, {"messages": []}))
    assert call.status == 422
    assert call.json()["error_type"] == "validation"
    call = await send(app, request("POST", CHAT, HI, {"content-type": "text/plain"}))
    assert call.status == 415
    call = await send(app, request("POST", "/v1/chat", HI))
    assert (call.status, call.json()["error_type"]) == (404, "not_found")


@pytest.mark.parametrize(
    "agent", ["unknown/None; hf_hub/0.23.5; python/3.11.7", "@huggingface/inference/3.13.2 Node.js/20"]
)
async def test_hugging_faces_clients_get_tgis_errors_on_v1(agent: str) -> None:
    app = scripted_app(ScriptedEngine())
    for body, error in (
        ({"messages": []}, "`messages` must have at least one message"),
        (HI | {"top_p": 7}, "`top_p` must be in [0, 1], got 7.0"),
    ):
        call = await send(app, request("POST", CHAT, body, {"user-agent": agent}))
        assert call.status == 422
        assert call.json() == {"error": f"Input validation error: {error}", "error_type": "validation"}
    call = await send(app, request("POST", CHAT, {"messages": []}, {"user-agent": "python-httpx/0.28"}))
    assert (call.status, call.json()["error"]["type"]) == (400, "invalid_request_error")


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("MODEL_ID", "PORT")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, env=kept | {"PYTHONPATH": "."} | environ,
    )  # fmt: skip


def test_importing_the_app_does_not_import_torch() -> None:
    result = run_python("import sys, tgi_asgi.app; sys.exit('torch' in sys.modules)")
    assert (result.returncode, result.stderr) == (0, "")


RUN_LIFESPAN = """
import asyncio, tgi_asgi.app
async def receive(): return {"type": "lifespan.startup"}
async def send(message): pass
asyncio.run(tgi_asgi.app.app({"type": "lifespan"}, receive, send))
"""


def test_the_module_attribute_requires_model_id() -> None:
    result = run_python(RUN_LIFESPAN)
    assert result.returncode == 1
    assert "MODEL_ID is not set" in result.stderr.splitlines()[-1]


def test_the_module_attribute_says_which_variable_is_wrong() -> None:
    result = run_python(RUN_LIFESPAN, MODEL_ID="x", MAX_BATCH_SIZE="many")
    assert result.returncode == 1
    assert "MAX_BATCH_SIZE" in result.stderr.splitlines()[-1]


async def test_an_observer_that_fails_holds_no_body() -> None:
    def fails(exchange: Exchange, summary: RequestSummary) -> None:
        raise ZeroDivisionError

    app = scripted_app(ScriptedEngine())
    app.observers.append(fails)
    with pytest.raises(ZeroDivisionError):
        await send(app, request("POST", CHAT, HI))
    assert app.context.body_budget.held == 0
