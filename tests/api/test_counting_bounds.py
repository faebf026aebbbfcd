"""Routes that count tokens: how many requests at a time, whose turn it is, and how much they may count."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from tests.support.asgi import Call, request, send
from tests.support.client import client_of, post
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tests.support.toy_tokenizer import ToyTokenizer
from tests.support.waiting import LONGEST_S, until
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.types import EngineState

COUNTING: dict[str, dict[str, Any]] = {
    "/tokenize": {"inputs": "hi"},
    "/chat_tokenize": {"messages": [{"role": "user", "content": "hi"}]},
    "/detokenize": {"tokens": [97]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("path", COUNTING)
async def test_a_server_that_generates_as_much_as_it_can_still_counts_tokens(path: str) -> None:
    engine = ScriptedEngine(num_permits=0)
    app = scripted_app(engine)
    assert (await post(app, "/generate", {"inputs": "hi"})).status_code == 429
    assert (await post(app, path, COUNTING[path])).status_code == 200
    engine.state = EngineState.DRAINING
    assert (await post(app, path, COUNTING[path])).status_code == 503


@pytest.mark.parametrize("path", COUNTING)
async def test_so_many_requests_count_tokens_at_a_time(path: str) -> None:
    app = scripted_app(ScriptedEngine(), Settings(model_id="toy/model", max_concurrent_requests=2))
    app.context.tokenising_keys[None] = 2
    refused = await post(app, path, COUNTING[path])
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    app.context.tokenising_keys[None] = 1
    assert (await post(app, path, COUNTING[path])).status_code == 200
    assert (await post(app, path, {"tokens": "x", "inputs": 1, "messages": 1})).status_code in (400, 422)
    assert app.context.tokenising_keys.total() == 1


async def test_counting_long_texts_keeps_nobody_from_a_prompt_or_a_short_text() -> None:
    go_on = threading.Event()
    long_text = "slow" * 10_000
    counted: list[str] = []

    class Slow(ToyTokenizer):
        def encode_with_offsets(
            self, text: str, *, add_special_tokens: bool, is_marked: bool = False
        ) -> list[tuple[int, int, int]]:
            counted.append(text)
            if text == long_text:
                assert go_on.wait(20)
            return super().encode_with_offsets(
                text, add_special_tokens=add_special_tokens, is_marked=is_marked
            )

    engine = ScriptedEngine()
    engine.tokenizer = Slow()
    app = scripted_app(engine)
    try:
        async with client_of(app) as client, asyncio.timeout(LONGEST_S):
            slow_ones = [
                asyncio.create_task(client.post("/tokenize", json={"inputs": long_text})) for _ in range(8)
            ]
            leaving = [request("POST", "/tokenize", {"inputs": long_text}) for _ in range(8)]
            gone = [asyncio.create_task(send(app, call)) for call in leaving]
            await until(lambda: app.context.tokenising_keys.total() == 16)
            assert (await client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200
            assert (await client.post("/tokenize", json={"inputs": "hi"})).status_code == 200
            for call in leaving:
                call.gone.set()
            await asyncio.gather(*gone)
            assert app.context.tokenising_keys.total() == 8
            assert not any(task.done() for task in slow_ones)
            go_on.set()
            assert [(await task).status_code for task in slow_ones] == [200] * 8
    finally:
        go_on.set()
    assert not app.context.tokenising_keys
    assert counted.count(long_text) == 8, "what nobody waits for is not counted"


async def test_a_key_that_holds_all_places_leaves_other_keys_their_share_of_them() -> None:
    go_on = threading.Event()

    class Slow(ToyTokenizer):
        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            assert go_on.wait(20)
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    engine = ScriptedEngine()
    engine.tokenizer = Slow()
    app = scripted_app(engine, Settings(api_key=("a", "b", "c"), max_concurrent_requests=4))

    def counting(key: str) -> asyncio.Task[Call]:
        headers = {"authorization": f"Bearer {key}"}
        return asyncio.create_task(send(app, request("POST", "/detokenize", {"tokens": [97]}, headers)))

    try:
        waiting: list[asyncio.Task[Call]] = []
        for key, num_accepted in (("a", 4), ("b", 2), ("c", 1)):
            waiting.extend(counting(key) for _ in range(num_accepted))
            await until(lambda: app.context.tokenising_keys.total() == len(waiting))
            assert (await counting(key)).status == 429
        go_on.set()
        assert [call.status for call in await asyncio.gather(*waiting)] == [200] * 7
    finally:
        go_on.set()
    assert not app.context.tokenising_keys


@pytest.mark.parametrize("size", [4, 40_000])
async def test_a_key_that_counts_many_texts_keeps_no_other_key_from_counting(size: int) -> None:
    go_on = threading.Event()
    counted: list[str] = []

    class Slow(ToyTokenizer):
        def encode_with_offsets(
            self, text: str, *, add_special_tokens: bool, is_marked: bool = False
        ) -> list[tuple[int, int, int]]:
            counted.append(text[0])
            assert go_on.wait(20)
            return []

    engine = ScriptedEngine()
    engine.tokenizer = Slow()
    app = scripted_app(engine, Settings(api_key=("a", "b"), validation_workers=1))

    def counting(key: str) -> asyncio.Task[Call]:
        headers = {"authorization": f"Bearer {key}"}
        return asyncio.create_task(send(app, request("POST", "/tokenize", {"inputs": key * size}, headers)))

    try:
        tasks = [counting("a") for _ in range(20)]
        await until(lambda: app.context.tokenising_keys.total() == 20)
        tasks.append(counting("b"))
        await until(lambda: app.context.tokenising_keys.total() == 21)
        go_on.set()
        assert [call.status for call in await asyncio.gather(*tasks)] == [200] * 21
    finally:
        go_on.set()
    assert counted.index("b") <= 4, "it waits for those that have begun, and at most one more"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"inputs": "{text}"}),
        ("/tokenize", {"prompt": "{text}"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "{text}"}]}),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": "{text}"}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "{text}"}]}),
        ("/v1/responses/input_tokens", {"input": "{text}"}),
    ],
)
async def test_texts_whose_tokens_take_very_much_memory_are_not_counted(path: str, body: Any) -> None:
    class Cheap(ToyTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool, is_marked: bool = False) -> list[int]:
            return [97]

        def encode_with_offsets(
            self, text: str, *, add_special_tokens: bool, is_marked: bool = False
        ) -> list[tuple[int, int, int]]:
            return [(97, 0, 1)]

    engine = ScriptedEngine()
    engine.tokenizer = Cheap()
    is_native = path == "/chat_tokenize" or "inputs" in body
    app = scripted_app(engine)
    for size, status in ((4 * MIB - 1000, 200), (4 * MIB + 1, 422 if is_native else 400)):
        content = orjson.dumps(body).replace(b"{text}", b"a" * size)
        async with client_of(app) as client:
            answer = await client.post(path, content=content, headers={"content-type": "application/json"})
        if answer.status_code != status:
            pytest.fail(f"{answer.status_code}: {answer.text[:300]}")
    assert "are not counted: the limit is 4194304" in answer.text
