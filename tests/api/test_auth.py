"""API keys: which are accepted, the envelope of the refusals, and the routes that stay open."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.settings import Settings

KEYED = Settings(api_key=("first-key", "Zweiter-Schlüssel"))


async def call(
    method: str, path: str, authorization: str | bytes | None = None, settings: Settings = KEYED
) -> httpx.Response:
    headers = {} if authorization is None else {"authorization": authorization}
    async with client_of(scripted_app(ScriptedEngine(), settings)) as client:
        return await client.request(method, path, headers=headers, json={"inputs": "hi"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "authorization",
    ["Bearer first-key", "bearer first-key", "BEARER  first-key ", "Bearer Zweiter-Schlüssel".encode()],
)
async def test_each_key_passes_whatever_the_schemes_case(authorization: str | bytes) -> None:
    assert (await call("POST", "/generate", authorization)).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer FIRST-KEY", "Bearer first-ke",
     "Bearer first-key2", b"Bearer \xff\xfe"],
)  # fmt: skip
async def test_anything_else_is_a_401_with_a_challenge(authorization: str | bytes | None) -> None:
    response = await call("POST", "/generate", authorization)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error_type"] == "unauthorized"


@pytest.mark.parametrize("name", ["x-api-key", "api-key"])
async def test_a_key_may_come_in_a_header_of_its_own(name: str) -> None:
    async with client_of(scripted_app(ScriptedEngine(), KEYED)) as client:
        for own, other, status in (
            ("first-key", None, 200), ("wrong", None, 401), ("first-key", "Basic dTpw", 200),
            ("first-key", "Bearer wrong", 401), ("wrong", "Bearer first-key", 200),
        ):  # fmt: skip
            headers = {name: own} | ({} if other is None else {"authorization": other})
            answer = await client.post("/generate", headers=headers, json={"inputs": "hi"})
            assert answer.status_code == status, (own, other)


async def test_the_refusal_speaks_the_routes_dialect() -> None:
    assert isinstance((await call("POST", "/generate")).json()["error"], str)
    assert (await call("POST", "/v1/chat/completions")).json()["error"]["code"] == "invalid_api_key"
    assert (await call("POST", "/chat/completions")).json()["error"]["code"] == "invalid_api_key"  # no /v1
    compat = Settings(api_key=("k",), tgi_compat=True)
    assert isinstance((await call("POST", "/v1/chat/completions", settings=compat)).json()["error"], str)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/ping"), ("GET", "/metrics"), ("GET", "/"), ("HEAD", "/health"),
     ("GET", "/health/"), ("GET", "/page/main.js")],
)  # fmt: skip
async def test_probes_scrapes_and_pages_need_no_key(method: str, path: str) -> None:
    assert (await call(method, path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/"), ("POST", "/generate/"), ("POST", "/generate_stream"), ("POST", "/invocations"),
     ("POST", "/vertex"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/chat_tokenize"),
     ("GET", "/info"), ("GET", "/v1/models"), ("GET", "/v1/models/x"),
     ("GET", "/api-doc/openapi.json"), ("GET", "/docs"), ("GET", "/tokenizer_info"), ("POST", "/health"),
     ("GET", "/nowhere")],
)  # fmt: skip
async def test_everything_else_needs_one(method: str, path: str) -> None:
    assert (await call(method, path)).status_code == 401


async def test_without_keys_everything_is_open() -> None:
    assert (await call("POST", "/generate", settings=Settings())).status_code == 200
    assert (await call("POST", "/generate", "Bearer whatever", Settings())).status_code == 200


async def test_vertexs_health_path_is_open_and_its_predict_path_is_not() -> None:
    settings = Settings(api_key=("k",), aip_health_route="/aip/health", aip_predict_route="/aip/predict")
    assert (await call("GET", "/aip/health", settings=settings)).status_code == 200
    assert (await call("POST", "/aip/predict", settings=settings)).status_code == 401


async def test_keys_of_a_file_join_those_of_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team a\nalpha\n\n  beta  \n")
    settings = Settings(api_key=("gamma",), api_key_file=str(path))
    for key in ("alpha", "beta", "gamma"):
        assert (await call("POST", "/generate", f"Bearer {key}", settings)).status_code == 200
    assert (await call("POST", "/generate", "Bearer # team a", settings)).status_code == 401


async def test_a_key_file_from_windows_has_the_keys_that_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbfalpha\r\nbeta\r\n")
    for key in ("alpha", "beta"):
        answer = await call("POST", "/generate", f"Bearer {key}", Settings(api_key_file=str(path)))
        assert answer.status_code == 200


@pytest.mark.parametrize("content", [None, b"", b"# only a comment\n", b"\xff\xfe", b"a\0b\n", b"a\x1b b\n"])
def test_a_key_file_without_a_key_stops_the_server(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match="--api-key-file"):
        scripted_app(ScriptedEngine(), Settings(api_key_file=str(path)))


async def test_a_wrong_key_is_not_told_whether_the_path_exists() -> None:
    assert (await call("GET", "/nowhere")).json() == (await call("GET", "/info")).json()


async def test_requests_are_counted_for_the_key_that_they_carry() -> None:
    engine = ScriptedEngine()
    async with client_of(scripted_app(engine, KEYED)) as client:
        for key in ("first-key", "Zweiter-Schlüssel"):
            headers = {"authorization": f"Bearer {key}".encode()}
            await client.post("/generate", headers=headers, json={"inputs": "hi"})  # type: ignore[arg-type]
    assert [channel.permit.tenant for channel in engine.channels] == ["key 1", "key 2"]


async def test_what_administrators_may_do_is_there_only_with_a_key_for_it() -> None:
    path, keyed = "/abort_request", Settings(api_key=("k",), admin_api_key="root")
    assert (await call("POST", path, "Bearer root", Settings())).status_code == 404
    for key in ("Bearer k", "Bearer ", None):
        assert (await call("POST", path, key, keyed)).status_code == 401
    asked = await call("POST", path, "Bearer root", keyed)
    assert (asked.status_code, asked.json()["error"]) == (
        422,
        "Input validation error: `request_id` is required",
    )
