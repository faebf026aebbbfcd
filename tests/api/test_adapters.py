"""Adapters over HTTP: selected by `adapter_id` or `model`; listed, loaded and unloaded with the admin key."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from tests.support.client import client_of, post
from tests.support.scripted_engine import ScriptedChannel, ScriptedEngine, say, scripted_app
from tests.support.serving import serving as serving_at
from tests.support.tool_app import sdk_of
from tests.support.waiting import LONGEST_S, until
from tgi_asgi.app import App
from tgi_asgi.engine.adapters import Adapters
from tgi_asgi.errors import ModelLoadError, TgiError
from tgi_asgi.formats.sources import AdapterSource
from tgi_asgi.settings import Settings
from tgi_asgi.types import TokenEvent

ROOT = {"authorization": "Bearer root"}
SETTINGS = Settings(model_id="toy/model", admin_api_key="root", enable_lora=True)


class Loaded:
    """The adapter that the loader below returns."""

    weights, rank, num_bytes = "weights", 8, 1000

    def __init__(self, digest: bytes) -> None:
        self.digest = digest


def load(source: AdapterSource) -> Loaded:
    if source.location == "/broken":
        raise ModelLoadError("/broken: tensor 'x.lora_A.weight' has the rank 99; --max-lora-rank allows 64")
    return Loaded(source.location.encode())


async def serving(*names: str, settings: Settings = SETTINGS, engine: ScriptedEngine | None = None) -> App:
    """Return an app with loaded adapters."""
    adapters = Adapters(load, [AdapterSource(name, f"/{name}") for name in names], max_loaded=4)
    await adapters.start()
    return scripted_app(engine or ScriptedEngine(), settings, adapters=adapters)


def asked(app: App) -> list[str | None]:
    """Return the adapters of the requests that the engine has received."""
    assert app.context.served is not None
    engine: Any = app.context.served.engine
    return [None if each.adapter is None else each.adapter.name for each in engine.requests]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_adapter_id_names_an_adapter(path: str) -> None:
    app = await serving("sql")
    body = {"inputs": "hi", "parameters": {"adapter_id": "sql"}}
    assert (await post(app, path, body)).status_code == 200
    assert (await post(app, path, {"inputs": "hi"})).status_code == 200
    assert asked(app) == ["sql", None]


async def test_an_unknown_adapter_id_is_refused() -> None:
    app = await serving("sql")
    answer = await post(app, "/generate", {"inputs": "hi", "parameters": {"adapter_id": "other"}})
    assert answer.status_code == 422
    assert answer.json() == {
        "error": "Input validation error: `adapter_id` must name an adapter that is served. Given: other",
        "error_type": "validation",
    }
    assert asked(app) == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": ["hi", "you"]}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
        ("/api/generate", {"prompt": "hi", "stream": False}),
    ],
)
async def test_model_names_an_adapter_and_is_echoed(path: str, body: dict[str, Any]) -> None:
    app = await serving("sql", settings=Settings(model_id="toy/model", strict_model_names=True))
    answer = await post(app, path, {"model": "sql", **body})
    assert answer.status_code == 200
    assert answer.json()["model"] == "sql"
    assert "x-tgi-model" not in answer.headers
    assert set(asked(app)) == {"sql"}
    assert (await post(app, path, {"model": "other", **body})).status_code == 404


async def test_ollamas_tag_belongs_to_a_name_that_is_served_with_it() -> None:
    app = await serving("sql", "odd:latest", settings=Settings(model_id="toy/model", strict_model_names=True))
    for name in ("sql:latest", "odd:latest", "toy/model:latest"):
        body = {"model": name, "prompt": "hi", "stream": False}
        assert (await post(app, "/api/generate", body)).status_code == 200
        assert (await post(app, "/api/show", {"model": name})).status_code == 200
    assert asked(app) == ["sql", "odd:latest", None]


async def test_an_unknown_model_is_served_by_the_base_and_says_so() -> None:
    app = await serving("sql")
    answer = await post(app, "/v1/completions", {"model": "other", "prompt": "hi"})
    assert (answer.status_code, answer.headers["x-tgi-model"]) == (200, "toy/model")
    assert asked(app) == [None]


async def test_adapters_are_listed_with_their_parent() -> None:
    app = await serving("sql", "poems")
    async with client_of(app) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [
            ("toy/model", None), ("sql", "toy/model"), ("poems", "toy/model"),
        ]  # fmt: skip
        assert (await client.get("/v1/models/sql")).json() == listed[1]
        assert (await client.get("/v1/models/other")).status_code == 404


async def test_ollamas_clients_see_the_adapters_too() -> None:
    app = await serving("sql", "poems")
    async with client_of(app) as client:
        listed = (await client.get("/api/tags")).json()["models"]
    assert [(model["name"], model["model"], model["details"]["parent_model"]) for model in listed] == [
        ("toy/model", "toy/model", ""), ("sql", "sql", "toy/model"), ("poems", "poems", "toy/model"),
    ]  # fmt: skip
    assert len({model["digest"] for model in listed}) == 3


async def test_one_that_loads_is_503_in_each_envelope() -> None:
    go_on = threading.Event()

    def hold(source: AdapterSource) -> Loaded:
        assert go_on.wait(10)
        return Loaded(b"")

    adapters = Adapters(hold, [AdapterSource("sql", "/sql")], max_loaded=4)
    adapters.start()
    await asyncio.sleep(0)
    app = scripted_app(ScriptedEngine(), SETTINGS, adapters=adapters)
    try:
        native = await post(app, "/generate", {"inputs": "hi", "parameters": {"adapter_id": "sql"}})
        assert (native.status_code, native.json()["error_type"]) == (503, "unavailable")
        answer = await post(app, "/v1/completions", {"model": "sql", "prompt": "hi"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert {native.headers["retry-after"], answer.headers["retry-after"]} == {"2"}
        served: Any = app.context.served
        assert served.engine.num_permits == 128, "the permit must be returned"
    finally:
        go_on.set()
        adapters.close()


async def test_the_server_is_healthy_once_those_named_at_the_start_have_been_read() -> None:
    adapters = Waiting(["sql", "broken"])
    adapters.go_on.clear()
    app = scripted_app(ScriptedEngine(), SETTINGS, adapters=adapters)
    app.context.served = None
    app.start()
    async with client_of(app) as client:
        await until(lambda: app.context.describe_progress().startswith("reading adapters"))
        assert (await client.get("/health")).status_code == 503
        adapters.go_on.set()
        await until(lambda: app.context.served is not None)
        assert (await client.get("/health")).status_code == 200
        answer = await client.post("/generate", json={"inputs": "hi", "parameters": {"adapter_id": "sql"}})
        assert answer.status_code == 200, "an unreadable adapter must not affect the others"
    await app.stop()


class Waiting(Adapters):
    """Adapters that the test can unload while a request waits for them or for a thread."""

    def __init__(self, names: Sequence[str] = ("sql",)) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        super().__init__(self.read, [AdapterSource(name, f"/{name}") for name in names], max_loaded=1)

    def read(self, source: AdapterSource) -> Loaded:
        assert self.go_on.wait(10)
        return load(source)


@pytest.mark.parametrize("is_strict", [False, True])
async def test_prompts_of_a_request_have_the_adapter_that_it_named_though_it_is_unloaded(
    is_strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await serving("sql", settings=dataclasses.replace(SETTINGS, strict_model_names=is_strict))
    assert app.context.served is not None and app.context.served.adapters is not None
    adapters = app.context.served.adapters
    removals: list[asyncio.Task[None]] = []
    work = app.context.text_threads.run

    async def run(*args: Any) -> Any:  # called once the first prompt is tokenised: unload the adapter
        if not removals:
            removals.append(asyncio.create_task(adapters.remove("sql")))
            while "sql" in adapters:
                await asyncio.sleep(0)
        return await work(*args)

    monkeypatch.setattr(app.context.text_threads, "run", run)
    async with serving_at(app) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"model": "sql", "prompt": ["hi", "you", "they"]}
        answer = await client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["model"]) == (200, "sql")
    assert asked(app) == ["sql"] * 3
    await asyncio.wait_for(removals[0], LONGEST_S)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "sql", "prompt": ["hi", "you"]}),
        ("/generate", {"inputs": "hi", "parameters": {"adapter_id": "sql"}}),
    ],
)
async def test_a_request_that_waits_for_an_adapter_that_is_unloaded_is_refused(
    path: str, body: dict[str, Any]
) -> None:
    adapters = Waiting()
    await adapters.start()
    await adapters.add("other", "/other")  # evicts "sql" from memory
    app = scripted_app(ScriptedEngine(), SETTINGS, adapters=adapters)
    adapters.go_on.clear()
    request = asyncio.create_task(post(app, path, body))
    await asyncio.sleep(0.02)
    removal = asyncio.create_task(adapters.remove("sql"))
    await asyncio.sleep(0.01)
    adapters.go_on.set()
    answer = await asyncio.wait_for(request, LONGEST_S)
    assert answer.status_code == 404, answer.text
    if path != "/generate":
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("model", "adapter_not_found")
    assert asked(app) == [], "the base model must not answer instead"
    served: Any = app.context.served
    assert served.engine.num_permits == 128, "the permit must be returned"
    await asyncio.wait_for(removal, LONGEST_S)
    adapters.close()


async def test_a_replacement_that_cannot_be_read_leaves_the_one_that_works() -> None:
    app = await serving("sql")
    body = {"lora_name": "sql", "lora_path": "/broken", "load_inplace": True}
    answer = await post(app, "/v1/load_lora_adapter", body, ROOT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")
    assert (await post(app, "/v1/completions", {"model": "sql", "prompt": "hi"})).status_code == 200
    assert asked(app) == ["sql"]
    answer = await post(app, "/v1/load_lora_adapter", body | {"lora_path": "/better"}, ROOT)
    assert answer.status_code == 200
    assert (await post(app, "/v1/completions", {"model": "sql", "prompt": "hi"})).status_code == 200
    served: Any = app.context.served
    assert [each.adapter.key for each in served.engine.requests] == [b"/sql".hex(), b"/better".hex()]


async def test_the_administrator_loads_and_unloads() -> None:
    app = await serving()
    body = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    answer = await post(app, "/v1/load_lora_adapter", body, ROOT)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert (await post(app, "/v1/completions", {"model": "sql", "prompt": "hi"})).status_code == 200
    again = await post(app, "/v1/load_lora_adapter", body, ROOT)
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    inplace = await post(app, "/v1/load_lora_adapter", {**body, "load_inplace": True}, ROOT)
    assert inplace.status_code == 200
    answer = await post(app, "/v1/unload_lora_adapter", {"lora_name": "sql"}, ROOT)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    gone = await post(app, "/v1/unload_lora_adapter", {"lora_name": "sql"}, ROOT)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "adapter_not_found")
    assert asked(app) == ["sql"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "", "lora_path": "/a"}, "lora_name"),
        ({"lora_name": "x" * 257, "lora_path": "/a"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "/a"}, "lora_name"),
        ({"lora_name": "a", "lora_path": ""}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/broken"}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/" * 4097}, "lora_path"),
    ],
)
async def test_what_cannot_be_loaded_is_refused_with_the_reason(body: dict[str, Any], param: str) -> None:
    app = await serving("sql")
    answer = await post(app, "/v1/load_lora_adapter", body, ROOT)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert body["lora_path"] != "/broken" or "has the rank 99" in error["message"]
    assert (await post(app, "/v1/completions", {"model": "sql", "prompt": "hi"})).status_code == 200


async def test_null_is_the_default_of_a_replacement() -> None:
    app = await serving("sql")
    body = {"lora_name": "x", "lora_path": "/a", "load_inplace": None}
    assert (await post(app, "/v1/load_lora_adapter", body, ROOT)).status_code == 200
    again = await post(app, "/v1/load_lora_adapter", body, ROOT)
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_bodies_must_be_declared_as_json(path: str) -> None:
    body = {"lora_name": "sql", "lora_path": "/a"}
    app = await serving("sql")
    answer = await post(app, path, body, ROOT | {"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_the_routes_need_the_administrators_key_and_the_feature(path: str) -> None:
    body = {"lora_name": "sql", "lora_path": "/a"}
    app = await serving()
    assert (await post(app, path, body)).status_code == 401
    without = scripted_app(ScriptedEngine(), Settings(model_id="toy/model"))
    assert (await post(without, path, body, ROOT)).status_code == 404
    off = scripted_app(ScriptedEngine(), SETTINGS)
    answer = await post(off, path, body, ROOT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_supported")


async def test_an_unload_waits_for_the_requests_that_use_the_adapter() -> None:
    go_on = asyncio.Event()

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        await go_on.wait()
        async for events in say("a")(channel):
            yield events

    app = await serving("sql", engine=ScriptedEngine(script))
    request = asyncio.create_task(post(app, "/v1/completions", {"model": "sql", "prompt": "hi"}))
    await until(lambda: bool(asked(app)))
    removal = asyncio.create_task(post(app, "/v1/unload_lora_adapter", {"lora_name": "sql"}, ROOT))
    await asyncio.sleep(0.02)
    assert not removal.done()
    refused = await post(app, "/generate", {"inputs": "x", "parameters": {"adapter_id": "sql"}})
    assert refused.status_code == 422
    go_on.set()
    assert (await request).status_code == 200
    assert (await removal).status_code == 200


async def test_a_client_that_goes_away_lets_go_of_its_adapter() -> None:
    app = await serving("sql", engine=ScriptedEngine(say("a", finish=None)))
    async with client_of(app) as client:
        body = {"model": "sql", "prompt": "hi", "stream": True, "max_tokens": 400}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
    removal = await asyncio.wait_for(
        post(app, "/v1/unload_lora_adapter", {"lora_name": "sql"}, ROOT), LONGEST_S
    )
    assert removal.status_code == 200


async def test_openais_client_uses_an_adapter_as_a_model() -> None:
    app = await serving("sql")
    async with sdk_of(app) as client:
        assert [model.id async for model in client.models.list()] == ["toy/model", "sql"]
        answer = await client.chat.completions.create(
            model="sql", messages=[{"role": "user", "content": "hi"}]
        )
    assert answer.model == "sql"
    assert asked(app) == ["sql"]
