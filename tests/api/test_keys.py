"""Properties of an API key: its name, its requests per minute, its share of the cache, its priority."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.api import auth
from tgi_asgi.app import App
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.settings import Settings

TWO = ("first", "second")
HI = [{"role": "user", "content": "hi"}]


async def call(app: App, key: str, path: str = "/generate", **fields: Any) -> httpx.Response:
    body = fields or {"inputs": "hi"}
    async with client_of(app) as client:
        return await client.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def tenants(engine: ScriptedEngine) -> list[str | None]:
    return [channel.permit.tenant for channel in engine.channels]


async def test_a_key_has_the_name_that_its_file_gives_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who may come\nalice  secret-a\n\nsecret-b\n  bob\tsecret-c  \n")
    engine = ScriptedEngine()
    app = scripted_app(engine, Settings(api_key=("plain",), api_key_file=str(path)))
    for key in ("plain", "secret-a", "secret-b", "secret-c"):
        assert (await call(app, key)).status_code == 200
    assert tenants(engine) == ["key 1", "alice", "key 2", "bob"]
    assert (await call(app, "alice")).status_code == 401  # a key's name is not a key


def test_a_line_of_three_words_stops_the_server(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice secret a\n")
    with pytest.raises(ModelLoadError, match="a name and a key"):
        scripted_app(ScriptedEngine(), Settings(api_key_file=str(path)))


async def test_keys_are_read_again_while_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice old\n")
    engine = ScriptedEngine()
    app = scripted_app(engine, Settings(api_key=("plain",), api_key_file=str(path)))
    path.write_text("alice new\n")
    assert (await call(app, "new")).status_code == 401
    app.reload()
    assert [(await call(app, key)).status_code for key in ("new", "old", "plain")] == [200, 401, 200]
    assert tenants(engine) == ["alice", "key 1"]


async def test_a_key_without_a_name_never_gets_what_another_was_called(tmp_path: Path) -> None:
    """Cached prompts and stored responses belong to the key's name."""
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n")
    engine = ScriptedEngine()
    app = scripted_app(engine, Settings(api_key_file=str(path)))
    kept = (await call(app, "one", "/v1/responses", input="a secret")).json()["id"]
    for content in ("two\n", "three\ntwo\n"):
        path.write_text(content)
        app.reload()
        for key in content.split():
            again = await call(app, key, "/v1/responses", input="more", previous_response_id=kept)
            assert again.status_code == 400
    assert (await call(app, "two")).status_code == (await call(app, "three")).status_code == 200
    path.write_text("three\none\n")
    app.reload()
    assert (await call(app, "one")).status_code == 200
    assert tenants(engine) == ["key 1", "key 2", "key 3", "key 1"]


@pytest.mark.parametrize("content", [None, b"", b"# nobody\n", b"a b c\n", b"\xff\xfe"])
async def test_a_broken_key_file_keeps_the_old_keys_and_says_so(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n")
    app = scripted_app(ScriptedEngine(), Settings(api_key_file=str(path)))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    app.reload()
    [record] = caplog.records
    assert record.levelno == logging.ERROR and "keeping the current API keys" in record.getMessage()
    assert str(path) in record.getMessage()
    assert (await call(app, "old")).status_code == 200
    assert (await call(app, "")).status_code == 401


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time by which requests are counted, which stands still."""
    clock = [1000.0]
    monkeypatch.setattr(auth, "monotonic", lambda: clock[0])
    return clock


def limited(engine: ScriptedEngine | None = None) -> App:
    return scripted_app(engine or ScriptedEngine(), Settings(api_key=TWO, requests_per_minute=2))


async def test_a_key_has_so_many_requests_a_minute_and_others_have_theirs(clock: list[float]) -> None:
    engine = ScriptedEngine()
    app = limited(engine)
    assert [(await call(app, "first")).status_code for _ in range(3)] == [200, 200, 429]
    assert (await call(app, "second")).status_code == 200
    clock[0] += 29
    refused = await call(app, "first")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    clock[0] += 1
    assert [(await call(app, "first")).status_code for _ in range(2)] == [200, 429]
    clock[0] += 3600  # unused requests accumulate for one minute at most
    assert [(await call(app, "first")).status_code for _ in range(3)] == [200, 200, 429]
    assert engine.num_permits == 128


@pytest.mark.parametrize(
    ("path", "body", "is_expected"),
    [
        ("/generate", {"inputs": "hi"}, lambda body: body["error_type"] == "overloaded"),
        ("/v1/chat/completions", {"messages": HI}, lambda body: body["error"]["type"] == "rate_limit_error"),
        ("/v1/responses", {"input": "hi"}, lambda body: body["error"]["type"] == "rate_limit_error"),
        ("/v1/messages", {"messages": HI, "max_tokens": 2},
         lambda body: (body["type"], body["error"]["type"]) == ("error", "rate_limit_error")),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("clock")
async def test_too_many_requests_are_refused_in_the_clients_own_words(
    path: str, body: Any, is_expected: Any
) -> None:
    app = limited()
    answers = [await call(app, "first", path, **body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[-1].headers["retry-after"] == "30"
    assert is_expected(answers[-1].json()), answers[-1].text


@pytest.mark.usefixtures("clock")
async def test_only_what_generates_is_counted() -> None:
    app = limited()
    for _ in range(3):
        assert (await call(app, "first", "/tokenize")).status_code == 200
    assert [(await call(app, "first")).status_code for _ in range(3)] == [200, 200, 429]
    async with client_of(app) as client:
        headers = {"authorization": "Bearer first"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_anthropics_clients_send_their_key_as_x_api_key() -> None:
    engine = ScriptedEngine()
    app = scripted_app(engine, Settings(api_key=TWO))
    body = {"messages": HI, "max_tokens": 2}
    async with client_of(app) as client:
        for key, status in (("second", 200), ("third", 401), ("", 401)):
            answer = await client.post("/v1/messages", json=body, headers={"x-api-key": key})
            assert answer.status_code == status
    assert tenants(engine) == ["key 2"]
    assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("asked", "taken"), [(5, 5), (10, 10), (11, 10), (-11, -10), (-(2**62), -10), (10**30, 10)]
)
async def test_a_priority_is_cut_to_what_one_may_have(asked: int, taken: int) -> None:
    engine = ScriptedEngine()
    app = scripted_app(engine, Settings())
    await call(app, "-", "/v1/chat/completions", messages=HI, priority=asked)
    await call(app, "-", "/v1/completions", prompt="hi", priority=asked)
    assert [request.priority for request in engine.requests] == [taken, taken]


async def test_the_administrator_says_how_far_a_priority_goes() -> None:
    engine = ScriptedEngine()
    await call(
        scripted_app(engine, Settings(max_priority=0)), "-", "/v1/completions", prompt="hi", priority=-3
    )
    assert engine.requests[0].priority == 0


async def salts(settings: Settings, *calls: tuple[str, str | None]) -> list[str | None]:
    engine = ScriptedEngine()
    app = scripted_app(engine, settings)
    for key, salt in calls:
        given = {} if salt is None else {"cache_salt": salt}
        assert (await call(app, key, "/v1/completions", prompt="hi", **given)).status_code == 200
    return [request.cache_salt for request in engine.requests]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 9}),
    ],
)
async def test_every_api_keeps_prompts_with_a_salt_apart(path: str, prompt: dict[str, Any]) -> None:
    engine = ScriptedEngine()
    app = scripted_app(engine)
    assert (await call(app, "-", path, **prompt, cache_salt="mine")).status_code == 200
    assert engine.requests[0].cache_salt == "mine"
    refused = await call(app, "-", path, **prompt, cache_salt="")
    assert refused.status_code == 400
    assert "cache_salt" in refused.json()["error"]["message"]


async def test_keys_do_not_share_cached_prefixes() -> None:
    first, again, second, salted, other = await salts(
        Settings(api_key=TWO),
        ("first", None), ("first", None), ("second", None), ("first", "x"), ("second", "x"),
    )  # fmt: skip
    assert first == again
    assert len({first, second, salted, other}) == 4
    assert None not in (first, second)


async def test_no_salt_of_a_client_leads_into_anothers_cache(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a first\nab second\n")
    found = await salts(
        Settings(api_key_file=str(path)), ("first", "b"), ("second", None), ("first", "\0b"), ("second", "\0")
    )
    assert len(set(found)) == 4


async def test_keys_share_cached_prefixes_where_the_administrator_says_so() -> None:
    settings = Settings(api_key=TWO, share_prefix_cache=True)
    assert await salts(settings, ("first", None), ("second", None), ("second", "x")) == [None, None, "x"]


async def test_without_keys_all_share_the_cache() -> None:
    assert await salts(Settings(), ("-", None), ("-", "x")) == [None, "x"]
