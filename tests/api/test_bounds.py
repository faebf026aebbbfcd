"""What one request may use: long names, memory, bodies in flight, texts to tokenise, threads."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import orjson
import pytest

from tests.support.asgi import Call, peak_of, request, send
from tests.support.client import client_of, post
from tests.support.scripted_engine import (
    ScriptedChannel,
    ScriptedEngine,
    fail_with,
    say,
    scripted_app,
    toy_info,
)
from tests.support.toy_tokenizer import ToyTokenizer
from tests.support.waiting import LONGEST_S
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.app import App
from tgi_asgi.errors import GenerationFailed, TgiError
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.types import TokenEvent

HI: list[Any] = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 9},
}
TEXTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/responses": lambda text: {"input": text},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 9},
    "/generate": lambda text: {"inputs": text},
    "/generate_stream": lambda text: {"inputs": text},
    "/invocations": lambda text: {"inputs": text},
    "/vertex": lambda text: {"instances": [{"inputs": text}]},
}


# Names that responses repeat.


@pytest.mark.parametrize("path", BODIES)
async def test_a_models_name_is_short_or_refused(path: str) -> None:
    app = scripted_app(ScriptedEngine())
    answer = await post(app, path, {**BODIES[path], "model": "m" * 256})
    assert (answer.status_code, answer.json()["model"]) == (200, "m" * 256)
    for size in (257, MIB):
        answer = await post(app, path, {**BODIES[path], "model": "m" * size})
        assert answer.status_code == 400
        assert "model" in answer.json()["error"]["message"]
        assert answer.json()["error"].get("param", "model") == "model"
        assert len(answer.content) < 1000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_requests_own_id_is_short_or_refused(path: str) -> None:
    app = scripted_app(ScriptedEngine())
    answer = await post(app, path, {**BODIES[path], "request_id": "r" * 256})
    assert answer.json()["id"].endswith("-" + "r" * 256)
    for size in (257, MIB):
        answer = await post(app, path, {**BODIES[path], "request_id": "r" * size})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_id")
        assert len(answer.content) < 1000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_many_choices_with_long_names_take_little_memory(path: str) -> None:
    app = scripted_app(ScriptedEngine(say("a")))
    names = {"model": "m" * 256, "request_id": "r" * 256}
    body = {**BODIES[path], **names, "n": 64, "stream": True}
    await send(app, request("POST", path, body))  # warm up one-time allocations
    call = request("POST", path, body)
    peak = await peak_of(app, call)
    assert call.status == 200 and call.is_complete
    assert peak < 4 * MIB


# Bodies in flight.


BUDGET = Settings(max_body_memory=1000)
LARGE = orjson.dumps({"messages": HI, "max_tokens": 9, "input": "hi", "inputs": "hi", "prompt": "x" * 600})


def sent_in_parts(path: str = "/v1/chat/completions", body: bytes = LARGE) -> Call:
    return request("POST", path, chunks=[body[:500], body[500:]])


class HalfSent:
    """A request whose client has sent the first half of its body and then waits."""

    def __init__(self, app: App, path: str = "/v1/chat/completions") -> None:
        self.call = request("POST", path)
        self.rest: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.rest.put_nowait({"type": "http.request", "body": LARGE[:500], "more_body": True})
        self.task = asyncio.create_task(app(self.call.scope, self.rest.get, self.call.send))

    async def is_held(self, app: App) -> None:
        async with asyncio.timeout(LONGEST_S):
            while not app.context.body_budget.held:
                await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("path", "is_expected"),
    [
        ("/v1/chat/completions", lambda body: body["error"]["type"] == "rate_limit_error"),
        ("/v1/responses", lambda body: body["error"]["code"] == "rate_limit_exceeded"),
        (
            "/v1/messages",
            lambda body: body["error"]["type"] == "rate_limit_error" and body["type"] == "error",
        ),
        ("/generate", lambda body: body["error_type"] == "overloaded"),
        ("/tokenize", lambda body: "error" in body),
        ("/detokenize", lambda body: "error" in body),
        ("/vertex", lambda body: "error" in body),
        ("/api/chat", lambda body: isinstance(body["error"], str)),
    ],
)
async def test_more_bodies_than_there_is_room_for_are_refused(
    path: str, is_expected: Callable[[Any], bool]
) -> None:
    app = scripted_app(ScriptedEngine(), BUDGET)
    first = HalfSent(app)
    await first.is_held(app)
    refused = await send(app, sent_in_parts(path))
    assert refused.status == 429 and refused.is_complete
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert is_expected(refused.json())
    # The first request's bytes are held; the refused request's are released.
    assert app.context.body_budget.held == 500
    first.rest.put_nowait({"type": "http.request", "body": LARGE[500:], "more_body": False})
    first.rest.put_nowait({"type": "http.disconnect"})
    await first.task
    assert app.context.body_budget.held == 0
    assert (await send(app, sent_in_parts(path))).status != 429


async def test_one_body_alone_may_be_larger_than_the_budget() -> None:
    app = scripted_app(ScriptedEngine(), Settings(max_body_memory=1))
    assert (await send(app, sent_in_parts())).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": HI}, 200),
        ("/v1/chat/completions", {"messages": HI, "stream": True}, 200),
        ("/v1/chat/completions", {"messages": HI, "n": 0}, 400),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 9999}, 400),
        ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "regex", "value": "("}}, 400),
        ("/v1/messages", {"messages": HI, "max_tokens": 9, "stream": True}, 200),
        ("/v1/messages/count_tokens", {"messages": HI}, 200),
        ("/v1/messages/count_tokens", {"messages": 1}, 400),
        ("/v1/responses", {"input": "hi", "previous_response_id": "x"}, 400),
        ("/invocations", {"inputs": "hi"}, 200),
        ("/invocations", {"nothing": 1}, 422),
        ("/tokenize", {"inputs": "hi"}, 200),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/generate", b"{", 400),
        ("/generate", b"x" * 2000, 413),
        ("/nowhere", {"a": 1}, 404),
    ],
)
async def test_however_a_request_ends_its_body_is_let_go(path: str, body: Any, status: int) -> None:
    app = scripted_app(ScriptedEngine(), Settings(payload_limit=1000))
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    call = await send(app, request("POST", path, chunks=[data[:5], data[5:]]))
    assert call.status == status, call.content
    assert app.context.body_budget.held == 0


@pytest.mark.parametrize("how", ["cancelled", "disconnected"])
async def test_a_client_that_goes_while_it_sends_leaves_nothing_behind(how: str) -> None:
    app = scripted_app(ScriptedEngine(), BUDGET)
    first = HalfSent(app)
    await first.is_held(app)
    if how == "cancelled":
        first.task.cancel()
    else:
        first.rest.put_nowait({"type": "http.disconnect"})
    await asyncio.gather(first.task, return_exceptions=True)
    assert first.call.sent == []
    assert app.context.body_budget.held == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["answered", "failed", "cancelled", "disconnected"])
async def test_a_body_is_held_until_its_request_is_answered(how: str, stream: bool) -> None:
    go_on = asyncio.Event()

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        await go_on.wait()
        after = fail_with(GenerationFailed("broken")) if how == "failed" else say("a")
        async for events in after(channel):
            yield events

    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    engine = ScriptedEngine(script)
    app = scripted_app(engine, BUDGET)
    body = orjson.dumps({"messages": HI, "stream": stream})
    call = request("POST", "/v1/chat/completions", body)
    task = asyncio.create_task(send(app, call))
    async with asyncio.timeout(LONGEST_S):
        while not engine.channels:
            await asyncio.sleep(0.001)
    assert app.context.body_budget.held == len(body)  # the answer still needs the body's contents
    if how == "cancelled":
        task.cancel()
    elif how == "disconnected":
        call.gone.set()
    else:
        go_on.set()
    await asyncio.gather(task, return_exceptions=True)
    assert app.context.body_budget.held == 0
    assert engine.num_permits == 128
    gc.collect()
    assert complaints == []  # no future with an unretrieved exception


# Texts before they are tokenised.


class Spy(ToyTokenizer):
    """Records the lengths of the texts that it tokenises."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool, is_marked: bool = False) -> list[int]:
        self.sizes.append(len(text))
        return super().encode(text, add_special_tokens=add_special_tokens, is_marked=is_marked)


def spied(**changes: Any) -> tuple[App, Spy]:
    engine = ScriptedEngine()
    spy = engine.tokenizer = Spy()
    info = toy_info(max_input_tokens=20, max_total_tokens=40)
    return scripted_app(
        engine, Settings(**changes), info=info, chat_template="{{ messages[0].content }}"
    ), spy


@pytest.mark.parametrize("path", TEXTS)
async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(path: str) -> None:
    app, spy = spied()
    most = 20 * spy.longest_token
    answer = await post(app, path, TEXTS[path]("a" * (most + 1)))
    assert answer.status_code in (400, 422)
    openai = "maximum context length is 40 tokens, of which a prompt may take 20. However, your "
    assert (
        (openai in answer.text and "resulted in 21 tokens or more" in answer.text)
        or "at least 21" in answer.text
        or "too long: 21 tokens > 20" in answer.text
    ), answer.text
    assert spy.sizes == []
    answer = await post(app, path, TEXTS[path]("a" * most))  # may fit: the length in tokens must be counted
    assert answer.status_code in (400, 422)
    assert spy.sizes == [most]


@pytest.mark.parametrize(("path", "is_compat"), [("/generate", False), ("/v1/chat/completions", True)])
async def test_tgi_s_clients_are_told_of_such_a_text_in_tgi_s_words(path: str, is_compat: bool) -> None:
    app, spy = spied(tgi_compat=is_compat)
    answer = await post(app, path, TEXTS[path]("a" * (20 * spy.longest_token + 1)))
    message = "Input validation error: `inputs` must have less than 20 tokens. Given: at least 21"
    assert answer.json() == {"error": message, "error_type": "validation"}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"truncate_prompt_tokens": 5}),
        ("/v1/completions", {"truncate_prompt_tokens": 5}),
        ("/generate", {"parameters": {"truncate": 5, "max_new_tokens": 2}}),
    ],
)
async def test_of_a_text_that_is_to_be_cut_only_the_end_is_tokenised(path: str, more: dict[str, Any]) -> None:
    app, spy = spied()
    engine = app.context.ready().engine
    body = TEXTS[path]("a" * MIB + "bcdef") | more
    if path != "/generate":
        body["max_tokens"] = 2
    answer = await post(app, path, body)
    assert answer.status_code == 200, answer.text
    assert isinstance(engine, ScriptedEngine)
    assert bytes(engine.requests[0].prompt_ids) == b"bcdef"
    [size] = spy.sizes
    assert size <= 100 * spy.longest_token


# Threads and permits.


async def test_a_slow_grammar_does_not_keep_other_prompts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, compile_now = threading.Event(), GrammarCompiler.compile
    num_waiting = threading.Semaphore(0)

    def slow(compiler: GrammarCompiler, source: Any) -> Any:
        num_waiting.release()
        assert go_on.wait(20)
        return compile_now(compiler, source)

    monkeypatch.setattr(GrammarCompiler, "compile", slow)
    app = scripted_app(ScriptedEngine(say('"a"')))
    constrained = {"messages": HI, "response_format": {"type": "regex", "value": '"a"'}}
    try:
        async with client_of(app) as client, asyncio.timeout(LONGEST_S):
            path = "/v1/chat/completions"
            slow_ones = [asyncio.create_task(client.post(path, json=constrained)) for _ in range(8)]
            await asyncio.to_thread(num_waiting.acquire)
            for _ in range(4):
                assert (await client.post(path, json={"messages": HI})).status_code == 200
            assert not any(task.done() for task in slow_ones)
            go_on.set()
            assert [(await task).status_code for task in slow_ones] == [200] * 8
    finally:
        go_on.set()


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/v1/chat/completions", {}, 200),
        ("/v1/chat/completions", {"stream": True}, 200),
        ("/v1/responses", {"input": "hi"}, 200),
        ("/generate", {"inputs": "hi"}, 200),
        ("/invocations", {}, 200),
        ("/v1/chat/completions", {"n": 0}, 400),
        ("/v1/chat/completions", {"max_tokens": 9999}, 400),
        ("/v1/nowhere", {}, 404),
    ],
)
async def test_a_request_that_has_ended_needs_no_collector_to_be_freed(
    path: str, fields: dict[str, Any], status: int
) -> None:
    engine = ScriptedEngine()
    app = scripted_app(engine)
    exchanges: list[weakref.ref[Exchange]] = []
    app.observers.append(lambda exchange, _: exchanges.append(weakref.ref(exchange)))
    call = request("POST", path, {"messages": HI, **fields})
    gc.disable()
    try:
        assert (await send(app, call)).status == status
        engine.channels.clear()
        for _ in range(3):  # let the task that watches for a disconnect end
            await asyncio.sleep(0)
        assert [exchange() for exchange in exchanges] == [None]
    finally:
        gc.enable()
