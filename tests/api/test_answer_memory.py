"""The memory of answers that are kept until they are sent: bounded and shared; small ones never fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
import pytest

from tests.support.asgi import Call, events_of, peak_of, request, send
from tests.support.scripted_engine import LOGPROB, ScriptedChannel, ScriptedEngine, scripted_app
from tests.support.toy_tokenizer import ToyTokenizer
from tests.support.waiting import LONGEST_S
from tgi_asgi.api.budgets import AnswerMemory, KeptAnswer, token_bytes
from tgi_asgi.app import App
from tgi_asgi.errors import TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.types import FinishReason, TokenEvent

HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MAX_BYTES = 100_000  # 22 tokens with 20 alternatives, or 390 without
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "logprobs": True, "top_logprobs": 20},
    COMPLETIONS: {"prompt": "hi", "logprobs": 20},
    RESPONSES: {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 20},
    "/generate": {"inputs": "hi", "parameters": {"details": True, "top_n_tokens": 5}},
    "/api/chat": {"messages": HI, "logprobs": True, "top_logprobs": 20, "stream": False},
    "/v1/messages": {"messages": HI, "max_tokens": 9},
}


async def endless(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
    """Deliver a token at each turn, 2,000 at most."""
    k = channel.request.sampling.logprobs
    top = None if k is None else [(97 + rank, LOGPROB - rank) for rank in range(k)]
    for number in range(2000):
        await asyncio.sleep(0)
        finish = FinishReason.LENGTH if number == 1999 else None
        yield [TokenEvent(i, 97, b"a", "a", LOGPROB, top, finish=finish) for i in range(channel.request.n)]


def app_of(engine: ScriptedEngine) -> App:
    return scripted_app(engine, Settings(max_answer_memory=MAX_BYTES))


async def ask(app: App, path: str, **fields: Any) -> Call:
    async with asyncio.timeout(LONGEST_S):
        return await send(app, request("POST", path, {**BODIES[path], **fields}))


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (CHAT, "top_logprobs"), (COMPLETIONS, "logprobs"), (RESPONSES, "top_logprobs"),
        ("/generate", "parameters.top_n_tokens"), ("/api/chat", "top_logprobs"),
        ("/v1/messages", "max_tokens"),
    ],
)  # fmt: skip
async def test_an_answer_that_grows_too_large_fails_and_frees_everything(path: str, param: str) -> None:
    engine = ScriptedEngine(endless)
    app = app_of(engine)
    call = await ask(app, path)
    assert call.status == (422 if path == "/generate" else 400)
    assert f"`{param}`: the answer takes more than {MAX_BYTES} bytes" in call.content.decode()
    assert (b"a stream has no such limit" in call.content) == (path != RESPONSES)
    assert engine.channels[0].is_cancelled and engine.num_permits == 128
    assert app.context.answer_memory.held == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_has_no_such_limit(path: str) -> None:
    call = await ask(app_of(ScriptedEngine(endless)), path, stream=True)
    assert len(call.content) > 2 * MAX_BYTES
    assert events_of(call.content)[-2]["choices"][0]["finish_reason"] == "length"


async def test_a_stream_that_keeps_log_probabilities_ends_with_the_error() -> None:
    app = app_of(ScriptedEngine(endless))
    call = await ask(app, RESPONSES, stream=True)
    last = orjson.loads(call.content.rpartition(b"data: ")[2])
    assert (call.status, last["type"]) == (200, "response.failed")
    assert last["response"]["error"]["message"].startswith("`top_logprobs`: the answer takes more")
    assert app.context.answer_memory.held == 0
    bare = await ask(app, RESPONSES, stream=True, include=[])
    assert b"event: response.incomplete" in bare.content  # all of its tokens came


async def test_a_stream_that_only_has_to_be_sent_is_refused_no_more() -> None:
    async def short(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        for finish in (None, FinishReason.EOS):
            yield [TokenEvent(0, 97, b"a", "a", LOGPROB, finish=finish)]

    app = app_of(ScriptedEngine(short))
    call = request("POST", RESPONSES, {**BODIES[RESPONSES], "stream": True})
    call.gate.clear()
    answering = asyncio.create_task(send(app, call))
    async with asyncio.timeout(LONGEST_S):
        while not call.num_blocked:
            await asyncio.sleep(0)
    memory, errors = app.context.answer_memory, list[str]()
    held = memory.held
    assert held > MAX_BYTES / 2
    other = kept(memory, None, errors)
    other.add_tokens(MAX_BYTES - held + 1)
    assert (memory.held, errors) == (held, ["None: Overloaded"])
    call.gate.set()
    await answering
    assert b"event: response.completed" in call.content and memory.held == 0
    assert b"\ntgi_request_success 1\n" in app.context.metrics.render()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_is_refused_before_it_is_computed(stream: bool) -> None:
    engine = ScriptedEngine(endless)
    app = app_of(engine)
    call = await ask(app, COMPLETIONS, prompt=[[97] * 10] * 3, echo=True, stream=stream)
    assert (call.status, call.json()["error"]["param"]) == (400, "logprobs")
    assert all(channel.stats.generated_tokens < 5 for channel in engine.channels)
    assert app.context.answer_memory.held == 0


async def test_what_is_requested_is_not_refused_in_advance() -> None:
    async def short(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        yield [TokenEvent(i, 97, b"a", "a", LOGPROB, finish=FinishReason.EOS) for i in range(20)]

    assert (await ask(app_of(ScriptedEngine(short)), CHAT, n=20)).status == 200


def kept(memory: AnswerMemory, tenant: str | None, errors: list[str]) -> KeptAnswer:
    answer = KeptAnswer(memory, tenant, "n", "Ask for less", 0, 1)
    answer.begin(lambda error: errors.append(f"{tenant}: {type(error).__name__}"))
    return answer


def test_the_largest_answer_fails_of_the_key_that_holds_most() -> None:
    memory, errors = AnswerMemory(10_000), list[str]()
    mine, *theirs = (kept(memory, tenant, errors) for tenant in ("mine", "theirs", "theirs"))
    mine.add_tokens(4000)
    for each, size in zip(theirs, (3000, 2500), strict=True):
        each.add_tokens(size)
    assert errors == []
    mine.add_tokens(1000)
    assert errors == ["theirs: Overloaded"]
    theirs[0].add_tokens(1000)  # which arrives before the request has ended
    assert memory.held == 7500
    mine.add_tokens(5500)
    assert errors[1:] == ["mine: InvalidRequest"]


def test_a_small_answer_never_fails_and_a_complete_one_no_more() -> None:
    memory, errors = AnswerMemory(10_240), list[str]()
    large, small = kept(memory, None, errors), kept(memory, None, errors)
    with memory.keeping(large):
        large.add_tokens(10_240)
        large.end()
        small.add_tokens(10)
        assert errors == []
        small.add_tokens(1)
        assert errors == ["None: Overloaded"]
    assert memory.held == 0


def test_a_token_counts_its_log_probabilities() -> None:
    assert [token_bytes(num_top) for num_top in (None, 0, 20)] == [256, 456, 4456]


@pytest.mark.parametrize(("path", "per_token"), [(CHAT, 5000), (COMPLETIONS, 2600)])
async def test_log_probabilities_of_a_whole_answer_take_little_memory(path: str, per_token: int) -> None:
    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        for number in range(1, 501):
            await asyncio.sleep(0)
            finish = FinishReason.LENGTH if number == 500 else None
            top = [(1000 * number + rank, -1.234567 - number - rank) for rank in range(20)]
            yield [TokenEvent(i, 97, b"a", "a", -0.1234567, [*top], finish=finish) for i in range(4)]

    class Tokenizer(ToyTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b"%6d" % token_id

    engine = ScriptedEngine(script)
    engine.tokenizer = Tokenizer()
    app = scripted_app(engine)
    call = request("POST", path, {**BODIES[path], "n": 4})
    peak = await peak_of(app, call)
    assert call.status == 200 and len(call.json()["choices"]) == 4
    assert peak < per_token * 4 * 500
