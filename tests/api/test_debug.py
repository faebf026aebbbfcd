"""The debug endpoint: visible to the administrator, and hidden by default."""

from __future__ import annotations

import asyncio

from tests.support.client import client_of
from tests.support.fake_runner import FakeRunner
from tests.support.scripted_engine import ScriptedEngine, scripted_app, toy_info
from tests.support.toy_tokenizer import ToyTokenizer
from tests.support.waiting import LONGEST_S
from tgi_asgi.api.served import Served
from tgi_asgi.app import create_app
from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.stats import Histogram
from tgi_asgi.observe.metrics import LAG_INTERVAL_S, LoopLag
from tgi_asgi.settings import Settings


async def test_the_engine_is_shown_only_where_the_administrator_asks_for_it() -> None:
    async with client_of(scripted_app(ScriptedEngine())) as client:
        assert (await client.get("/debug/engine")).status_code == 404


async def test_it_needs_a_key_like_any_other_route() -> None:
    settings = Settings(debug_endpoints=True, api_key=("k",))
    async with client_of(scripted_app(ScriptedEngine(), settings)) as client:
        assert (await client.get("/debug/engine")).status_code == 401


async def test_requests_and_their_blocks_are_shown_but_nothing_of_what_they_say() -> None:
    settings = Settings(debug_endpoints=True)
    runner = FakeRunner(is_manual=True)
    engine = Engine(runner, ToyTokenizer(), settings, toy_info())
    engine.start()
    served = Served(engine, ToyTokenizer(), None, toy_info(), engine.stats)  # type: ignore[arg-type]
    app = create_app(settings, lambda settings, progress: served)
    app.context.served = served
    async with client_of(app) as client:
        body = {"inputs": "a secret of forty characters, or nearly.", "parameters": {"max_new_tokens": 9}}
        asking = asyncio.create_task(client.post("/generate", json=body, headers={"x-request-id": "the-id"}))
        async with asyncio.timeout(LONGEST_S):
            while not runner.num_in_flight:
                await asyncio.sleep(0)
        answer = await client.get("/debug/engine")
        shown = answer.json()
        runner.is_manual = False
        runner.run_next()
        assert (await asking).status_code == 200
        after = (await client.get("/debug/engine")).json()
    assert "secret" not in answer.text
    [request] = shown["requests"]
    assert (request["request_id"], request["prompt_tokens"], request["max_tokens"]) == ("the-id", 40, 9)
    [sequence] = request["sequences"]
    assert (sequence["state"], [len(blocks) for blocks in sequence["blocks"]]) == ("running", [3])
    assert shown["blocks"] == {"total": 64, "used": 3, "free": 61, "touched": 3}
    assert shown["permits"]["taken"] == 1
    assert (after["requests"], after["blocks"]["used"], after["permits"]["taken"]) == ([], 0, 0)
    await engine.stop()


async def test_the_loops_lag_is_measured_until_it_is_stopped() -> None:
    histogram = Histogram((0.01, 100.0))
    lag = LoopLag(histogram)
    lag.start()
    async with asyncio.timeout(LONGEST_S):
        while not sum(histogram.counts):
            await asyncio.sleep(LAG_INTERVAL_S / 10)
    lag.stop()
    lag.stop()
    assert histogram.counts[-1] == 0
