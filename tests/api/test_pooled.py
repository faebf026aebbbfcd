"""The life of a call for vectors where it competes with others for capacity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from tests.engine.helpers import make_request
from tests.support.asgi import Call, request, send
from tests.support.fake_runner import FakeRunner
from tests.support.scripted_engine import ScriptedChannel, ScriptedEngine, scripted_app, toy_info
from tests.support.toy_tokenizer import ToyTokenizer
from tests.support.waiting import until
from tgi_asgi.api.served import Served
from tgi_asgi.app import App, create_app
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import Overloaded, TgiError
from tgi_asgi.model_info import Embedding
from tgi_asgi.settings import Settings
from tgi_asgi.types import FinishReason, Pooling, PoolingKind, TokenEvent

INFO = toy_info(embedding=Embedding(Pooling(PoolingKind.LAST), 2, 30, is_normalized=False))
TEXTS = [f"text {number}" for number in range(24)]
GREEDY, MODEST = "key 1", "key 2"


def embedding(texts: Sequence[str]) -> Call:
    return request("POST", "/v1/embeddings", {"input": texts}, {"authorization": "Bearer one"})


def vectors(call: Call) -> list[list[float]]:
    assert call.status == 200, call.content
    return [entry["embedding"] for entry in call.json()["data"]]


async def settle() -> None:
    """Let tasks that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


@dataclass
class Full:
    """A server with four places, of which one key's generations have three; steps run by hand."""

    app: App
    engine: Engine
    runner: FakeRunner

    @property
    def waiting(self) -> list[str]:
        return [channel.request.request_id for channel in self.engine._loop.waiting_newest_first()]

    async def run_until_one_waits(self, after: int) -> None:
        """Run steps until so many inputs have been computed and another one has not begun to run."""
        num_before = self.engine.stats.finished
        while not self.waiting or self.engine.stats.finished < num_before + after:
            self.runner.run_next()
            await settle()

    async def run_until_done(self, call: asyncio.Task[Call]) -> Call:
        while not call.done():
            if self.runner.num_in_flight:
                self.runner.run_next()
            await settle()
        return await call


@asynccontextmanager
async def full() -> AsyncIterator[Full]:
    settings = Settings(model_id="toy/model", max_concurrent_requests=4, api_key=("one", "two"))
    runner = FakeRunner(is_manual=True, num_blocks=256)
    tokenizer = ToyTokenizer()
    engine = Engine(runner, tokenizer, settings, INFO)
    served = Served(engine, tokenizer, None, INFO, engine.stats)  # type: ignore[arg-type]
    app = create_app(settings, loader=lambda settings, progress: served)
    app.context.served = served
    engine.start()
    generations = [engine.submit(make_request(5, 500), engine.acquire(1, GREEDY)) for _ in range(3)]
    await until(lambda: runner.num_in_flight == 2)
    yield Full(app, engine, runner)
    for generation in generations:
        generation.cancel()
    runner.is_manual = False
    while runner.num_in_flight:
        runner.run_next()
    await engine.stop()
    assert engine.admission.num_taken == 0
    app.context.close()


async def test_a_call_that_has_begun_waits_when_another_key_takes_its_place() -> None:
    async with full() as server:
        call = asyncio.create_task(send(server.app, embedding(TEXTS)))
        await until(lambda: bool(server.waiting))
        await server.run_until_one_waits(after=3)
        others = server.engine.acquire(1, MODEST)
        assert not server.waiting, "the input has made way at once"
        for _ in range(10):
            server.runner.run_next()
            await settle()
        assert not call.done() and not server.waiting
        others.release()
        found = await server.run_until_done(call)
        alone = await server.run_until_done(asyncio.create_task(send(server.app, embedding(TEXTS))))
    assert vectors(found) == vectors(alone)
    assert len(set(map(tuple, vectors(found)))) == len(TEXTS)


async def test_a_call_of_which_nothing_has_run_is_refused_as_others_are() -> None:
    async with full() as server:
        call = asyncio.create_task(send(server.app, embedding(TEXTS)))
        await until(lambda: bool(server.waiting))
        server.engine.acquire(1, MODEST).release()
        answer = await call
    assert answer.status == 429
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("period", [2, 3])
async def test_inputs_that_the_replicas_of_a_cluster_have_no_place_for_are_sent_again(period: int) -> None:
    """Other ingresses may have filled them."""
    num_sent = 0

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        nonlocal num_sent
        num_sent += 1
        is_refused = num_sent % period == 0
        await asyncio.sleep(0)
        if is_refused:
            channel.stats.scheduled_s = None
            yield Overloaded(retry_after_s=1)
            return
        channel.stats.vector = np.array([channel.request.prompt_ids[-1], 1], np.float32)
        yield [TokenEvent(0, 0, finish=FinishReason.STOP)]

    app = scripted_app(
        ScriptedEngine(script), Settings(model_id="toy/model", max_concurrent_requests=16), info=INFO
    )
    answer = await send(app, request("POST", "/v1/embeddings", {"input": [[7, id] for id in range(97, 107)]}))
    assert [vector[0] for vector in vectors(answer)] == list(range(97, 107))
    assert num_sent > 10
    app.context.close()
