"""Several models at one address."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest

from tests.support.asgi import Call, request, send
from tests.support.local_cluster import LocalCluster
from tests.support.waiting import LONGEST_S
from tgi_asgi.app import OwnedEngine
from tgi_asgi.cluster.dispatcher import ModelDispatcher, merged_metrics
from tgi_asgi.settings import Settings


@asynccontextmanager
async def dispatching(*names: str) -> AsyncIterator[ModelDispatcher]:
    """Yield a dispatcher with models of these names, one key, and CORS for any origin."""
    async with AsyncExitStack() as stack:
        apps = []
        for name in names:
            settings = Settings(
                model_id=name, api_key=("k",), strict_model_names=True, payload_limit=5000,
                cors_allow_origin=("*",),
            )  # fmt: skip
            apps.append((await stack.enter_async_context(LocalCluster(1, settings))).app)
        yield ModelDispatcher(apps)


@pytest.fixture
async def dispatcher() -> AsyncIterator[ModelDispatcher]:
    async with dispatching("org/a", "org/b") as made:
        yield made


KEY = {"authorization": "Bearer k"}


async def post(dispatcher: ModelDispatcher, path: str, body: Any, headers: dict[str, str] = KEY) -> Call:
    return await send(dispatcher, request("POST", path, body, headers))


def chat(model: str | None) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    return body if model is None else {**body, "model": model}


@pytest.mark.parametrize(("model", "answers"), [("org/a", "org/a"), ("org/b", "org/b"), (None, "org/a")])
async def test_a_request_goes_to_the_model_that_it_names(
    dispatcher: ModelDispatcher, model: str | None, answers: str
) -> None:
    answer = await post(dispatcher, "/v1/chat/completions", chat(model))
    assert answer.json()["model"] == answers


async def test_ollamas_clients_may_name_a_tag(dispatcher: ModelDispatcher) -> None:
    answer = await post(
        dispatcher, "/api/chat", {**chat("org/b:latest"), "options": {"num_predict": 3}, "stream": False}
    )
    assert (answer.status, answer.json()["model"]) == (200, "org/b")
    for field in ("model", "name"):
        assert (await post(dispatcher, "/api/show", {field: "org/b:latest"})).status == 200


async def test_a_name_that_is_not_served_is_refused(dispatcher: ModelDispatcher) -> None:
    answer = await post(dispatcher, "/v1/chat/completions", chat("org/c"))
    assert answer.status == 404
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_all_models_are_listed_and_described(dispatcher: ModelDispatcher) -> None:
    listed = (await send(dispatcher, request("GET", "/v1/models", headers=KEY))).json()
    described = (await send(dispatcher, request("GET", "/v1/models/org/b", headers=KEY))).json()
    assert [each["id"] for each in listed["data"]] == ["org/a", "org/b"]
    assert described["id"] == "org/b"


async def test_a_path_is_decoded_only_once() -> None:
    """A server decodes the path that it puts in the scope: `c%2Fd` there came as `c%252Fd`."""
    async with dispatching("a/b", "c%2Fd") as dispatcher:
        described = await send(dispatcher, request("GET", "/v1/models/c%2Fd", headers=KEY))
    assert (described.status, described.json()["id"]) == (200, "c%2Fd")


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps"])
async def test_all_models_are_listed_in_ollama_s_form(dispatcher: ModelDispatcher, path: str) -> None:
    listed = (await send(dispatcher, request("GET", path, headers=KEY))).json()
    names = [each["name"].removesuffix(":latest") for each in listed["models"]]
    assert names == ["org/a", "org/b"]


async def test_all_models_are_listed_in_anthropic_s_form(dispatcher: ModelDispatcher) -> None:
    headers = {**KEY, "anthropic-version": "2023-06-01"}
    listed = (await send(dispatcher, request("GET", "/v1/models", headers=headers))).json()
    assert [each["display_name"] for each in listed["data"]] == ["org/a", "org/b"]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("org/a", "org/b", False)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
async def test_what_all_models_answer_together_has_the_headers_of_one(
    dispatcher: ModelDispatcher, path: str
) -> None:
    headers = {**KEY, "x-request-id": "mine"}
    answer = await send(dispatcher, request("GET", path, headers=headers))
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["content-length"] == str(len(answer.content))
    head = await send(dispatcher, request("HEAD", path, headers=headers))
    assert (head.status, head.content) == (200, b"")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
async def test_other_methods_than_reading_are_answered_as_by_one_server(
    dispatcher: ModelDispatcher, path: str
) -> None:
    asks = {"origin": "https://example.org", "access-control-request-method": "GET"}
    preflight = await send(dispatcher, request("OPTIONS", path, headers=asks))
    assert "GET" in preflight.headers["access-control-allow-methods"]
    assert (await send(dispatcher, request("DELETE", path, headers=KEY))).status == 405
    assert (await post(dispatcher, path, {})).status == 405


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/org/b"])
async def test_lists_need_a_key(dispatcher: ModelDispatcher, path: str) -> None:
    assert (await send(dispatcher, request("GET", path))).status == 401


async def test_a_body_without_a_key_is_refused_as_by_one_server(dispatcher: ModelDispatcher) -> None:
    answer = await post(dispatcher, "/v1/chat/completions", chat("org/b"), {})
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("body", "status"), [(b"{nonsense", 400), (b'{"model": "' + b"x" * 6000 + b'"}', 413), (b"[1]", 400)]
)
async def test_what_is_wrong_with_a_body_is_said_by_the_api(
    dispatcher: ModelDispatcher, body: bytes, status: int
) -> None:
    answer = await post(dispatcher, "/v1/chat/completions", body)
    assert (answer.status, answer.is_complete) == (status, True)
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_in_pieces_that_grows_too_long_is_refused(dispatcher: ModelDispatcher) -> None:
    call = request("POST", "/v1/chat/completions", headers=KEY, chunks=[b" " * 2000] * 4)
    assert (await send(dispatcher, call)).status == 413
    assert dispatcher._apps[0].context.body_budget.held == 0


async def test_a_body_in_many_tiny_chunks_is_refused(dispatcher: ModelDispatcher) -> None:
    call = request("POST", "/v1/chat/completions", headers=KEY, chunks=[b" "] * 10_000)
    assert (await send(dispatcher, call)).status == 413
    assert len(call.body) > 5_000
    assert dispatcher._apps[0].context.body_budget.held == 0


async def test_a_body_that_does_not_come_is_given_up(
    dispatcher: ModelDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.cluster.dispatcher.BODY_TIMEOUT_S", 0.05)
    call = request("POST", "/v1/chat/completions", headers=KEY, chunks=[b" " * 2000])
    begin, messages = call.receive, list[Any]()

    async def stall() -> Any:
        if messages:
            await asyncio.Event().wait()
        messages.append({**await begin(), "more_body": True})
        return messages[0]

    monkeypatch.setattr(call, "receive", stall)
    answer = await asyncio.wait_for(send(dispatcher, call), LONGEST_S)
    assert answer.json()["error"]["code"] == "request_timeout"
    assert [app.context.body_budget.held for app in dispatcher._apps] == [0, 0]


async def test_nothing_of_a_body_stays_counted(dispatcher: ModelDispatcher) -> None:
    await post(dispatcher, "/v1/chat/completions", chat("org/b"))
    assert [app.context.body_budget.held for app in dispatcher._apps] == [0, 0]


async def test_a_conversation_continues_with_any_model(dispatcher: ModelDispatcher) -> None:
    """The routes of `/v1/conversations` name no model, so the first application has answered."""
    name = (await post(dispatcher, "/v1/conversations", {})).json()["id"]
    for model in ("org/a", "org/b"):
        body = {"model": model, "input": "hi", "conversation": name, "max_output_tokens": 16}
        answer = await post(dispatcher, "/v1/responses", body)
        assert (answer.status, answer.json()["model"]) == (200, model)
    items = await send(dispatcher, request("GET", f"/v1/conversations/{name}/items", headers=KEY))
    assert len(items.json()["data"]) == 4


async def test_one_metrics_page_has_both_models(dispatcher: ModelDispatcher) -> None:
    await post(dispatcher, "/v1/chat/completions", chat("org/b"))
    text = (await send(dispatcher, request("GET", "/metrics"))).content.decode()
    assert 'tgi_request_count{model_name="org/a"} 0' in text
    assert 'tgi_request_count{model_name="org/b"} 1' in text
    assert text.count("# TYPE tgi_request_count counter") == 1


async def test_the_cluster_is_well_while_one_model_is(dispatcher: ModelDispatcher) -> None:
    served = dispatcher._apps[0].context.served
    assert served is not None
    await cast(OwnedEngine, served.engine).stop()
    found = [(await send(dispatcher, request("GET", path))).status for path in ("/health", "/readyz")]
    assert found == [200, 503]


def test_a_family_stays_together() -> None:
    a = '# HELP x About x.\n# TYPE x counter\nx 1\n# HELP y About y.\n# TYPE y gauge\ny{k="v"} 2\n'
    merged = merged_metrics({"m": a, 'n"': a.replace(" 1\n", " 3\n")})
    assert merged.splitlines() == [
        "# HELP x About x.",
        "# TYPE x counter",
        'x{model_name="m"} 1',
        'x{model_name="n\\""} 3',
        "# HELP y About y.",
        "# TYPE y gauge",
        'y{model_name="m",k="v"} 2',
        'y{model_name="n\\"",k="v"} 2',
    ]
