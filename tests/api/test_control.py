"""Operating a running server: admin routes with a separate key, and the answers to probes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedChannel, ScriptedEngine, say, scripted_app
from tests.support.waiting import LONGEST_S
from tgi_asgi.app import App
from tgi_asgi.errors import TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, TokenEvent

SETTINGS = Settings(admin_api_key="root", api_key=("user",))
ROOT = {"authorization": "Bearer root"}
ROUTES = ["/abort_request", "/reset_prefix_cache", "/log_level"]


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    ours = logging.getLogger("tgi_asgi")
    level = ours.level
    yield
    ours.setLevel(level)


@asynccontextmanager
async def running(app: App, request_id: str) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """Keep a request running."""
    async with client_of(app) as client:
        headers = {"x-request-id": request_id, "authorization": "Bearer user"}
        task = asyncio.create_task(client.post("/generate", json={"inputs": "hi"}, headers=headers))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def post(app: App, path: str, body: object = None, headers: dict[str, str] = ROOT) -> httpx.Response:
    async with client_of(app) as client:
        return await client.post(path, json=body, headers=headers)


@pytest.mark.parametrize("path", ROUTES)
async def test_without_an_admin_key_there_are_no_admin_routes(path: str) -> None:
    for headers in ({}, ROOT):
        assert (await post(scripted_app(ScriptedEngine()), path, {}, headers)).status_code == 404
    app = scripted_app(ScriptedEngine(), Settings(api_key=("user",)))
    assert (await post(app, path, {}, {"authorization": "Bearer user"})).status_code == 404
    assert (await post(app, path, {}, ROOT)).status_code == 401  # as for any unknown path


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("authorization", [None, "Bearer user", "Bearer roo", "Basic root"])
async def test_an_admin_route_takes_no_key_but_its_own(path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    answer = await post(scripted_app(ScriptedEngine(), SETTINGS), path, {}, headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


async def test_the_admin_key_is_no_clients_key() -> None:
    answer = await post(scripted_app(ScriptedEngine(), SETTINGS), "/generate", {"inputs": "hi"})
    assert answer.status_code == 401


@pytest.mark.parametrize("name", ["request_id", "rid"])
async def test_a_request_is_ended_by_its_id(name: str) -> None:
    go_on = asyncio.Event()

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        await go_on.wait()
        async for events in say("a")(channel):
            yield events

    engine = ScriptedEngine(script)
    app = scripted_app(engine, SETTINGS)
    async with running(app, "victim") as victim, running(app, "bystander") as bystander:
        async with asyncio.timeout(LONGEST_S):
            while len(engine.channels) < 2:
                await asyncio.sleep(0)
        answer = await post(app, "/abort_request", {name: "victim"})
        assert (answer.status_code, answer.json()) == (200, {"aborted": 1})
        failed = await victim
        assert (failed.status_code, failed.json()["error_type"]) == (500, "incomplete_generation")
        go_on.set()
        assert (await bystander).status_code == 200
    assert engine.num_permits == 128


async def test_an_id_that_nothing_has_is_a_404() -> None:
    app = scripted_app(ScriptedEngine(), SETTINGS)
    assert (await post(app, "/abort_request", {"request_id": "nobody"})).status_code == 404
    assert (await post(app, "/abort_request", {})).status_code == 422
    assert (await post(app, "/abort_request", {"request_id": 1})).status_code == 422


async def test_the_prefix_cache_is_forgotten() -> None:
    engine = ScriptedEngine()
    engine.num_cached = 48
    app = scripted_app(engine, SETTINGS)
    async with client_of(app) as client:  # curl sends neither a body nor a content type
        answer = await client.post("/reset_prefix_cache", headers=ROOT)
    assert (answer.status_code, answer.json()) == (200, {"blocks": 3})
    assert engine.num_cached == 0


async def test_the_log_level_changes_while_the_server_runs() -> None:
    app = scripted_app(ScriptedEngine(), SETTINGS)
    for level, number in (("debug", logging.DEBUG), ("error", logging.ERROR)):
        answer = await post(app, "/log_level", {"level": level})
        assert (answer.status_code, answer.json()) == (200, {"level": level})
        assert logging.getLogger("tgi_asgi.anything").getEffectiveLevel() == number
    assert (await post(app, "/log_level", {"level": "loud"})).status_code == 422
    assert logging.getLogger("tgi_asgi.anything").getEffectiveLevel() == logging.ERROR


@pytest.mark.parametrize(
    ("state", "is_terminating", "live", "ready"),
    [
        (EngineState.LOADING, False, 200, 503),
        (EngineState.READY, False, 200, 200),
        (EngineState.READY, True, 200, 503),
        (EngineState.DRAINING, True, 200, 503),
        (EngineState.DEAD, False, 503, 503),
    ],
)
async def test_probes_tell_being_alive_from_being_ready(
    state: EngineState, is_terminating: bool, live: int, ready: int
) -> None:
    engine = ScriptedEngine()
    engine.state = state
    app = scripted_app(engine, SETTINGS)
    if state is EngineState.LOADING:
        app.context.served = None
    app.context.is_terminating = is_terminating
    async with client_of(app) as client:
        assert (await client.get("/livez")).status_code == live
        answer = await client.get("/readyz")
    assert answer.status_code == ready
    if ready == 503:
        assert answer.json()["state"] == ("draining" if is_terminating else state.value)
        assert answer.headers["retry-after"] == "2"


async def test_requests_are_taken_while_the_server_is_leaving() -> None:
    app = scripted_app(ScriptedEngine(), SETTINGS)
    app.context.is_terminating = True
    answer = await post(app, "/generate", {"inputs": "hi"}, {"x-api-key": "user"})
    assert answer.status_code == 200
