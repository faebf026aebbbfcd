"""Reading bodies under limits, request ids, and the conversion of exceptions into responses."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import orjson
import pytest

from tests.support.asgi import request, send
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.api import asgi
from tgi_asgi.api.asgi import Message
from tgi_asgi.api.openai import chat
from tgi_asgi.api.openai.params import check_common
from tgi_asgi.app import App
from tgi_asgi.settings import Settings

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def small_app() -> App:
    return scripted_app(ScriptedEngine(), Settings(payload_limit=1000))


async def test_a_declared_length_over_the_limit_is_refused_after_the_body_is_drained() -> None:
    call = await send(small_app(), request("POST", CHAT, b"x" * 1001))
    assert call.status == 413
    assert call.json()["error"]["code"] == "request_too_large"
    assert call.headers["connection"] == "close"
    assert call.body == []


async def test_a_chunked_body_is_refused_by_what_has_arrived() -> None:
    call = await send(small_app(), request("POST", CHAT, chunks=[b"x" * 600] * 5))
    assert call.status == 413
    assert call.body == []


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    body = b'{"messages":[{"role":"user","content":"' + b"a" * 300 + b'"}]}'
    body += b" " * (1000 - len(body))
    assert (await send(small_app(), request("POST", CHAT, body))).status == 200


async def test_a_body_in_pieces_is_put_together() -> None:
    call = request("POST", CHAT, chunks=[b'{"messages":[{"role":"us', b'er","content":"h', b"", b'i"}]}'])
    assert (await send(small_app(), call)).status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/nope"])
async def test_a_body_in_many_tiny_chunks_is_given_up(path: str) -> None:
    call = request("POST", path, chunks=[b" "] * 10_000)
    await send(scripted_app(ScriptedEngine()), call)
    assert call.status == (413 if path == CHAT else 404)
    assert len(call.body) > 5_000


async def test_a_body_may_be_sent_in_chunks_of_512_bytes() -> None:
    body = orjson.dumps({"messages": [{"role": "user", "content": "hi"}], "user": "a" * 200})
    chunks = [b" " * 512] * 4_000 + [body[i : i + 1] for i in range(len(body))]
    assert (await send(scripted_app(ScriptedEngine()), request("POST", CHAT, chunks=chunks))).status == 200


async def test_a_client_that_waits_for_the_answer_before_it_sends_the_rest_gets_it() -> None:
    """Clients that send `Expect: 100-continue` do this."""
    call = request("POST", CHAT, headers={"content-length": "100000000"}, chunks=[])
    async with asyncio.timeout(4):
        await send(small_app(), call)
    assert call.status == 413


@pytest.mark.parametrize("path", ["//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions//"])
async def test_of_several_slashes_one_counts(path: str) -> None:
    assert (await send(small_app(), request("POST", path, HI))).status == 200


async def test_a_client_that_leaves_while_it_sends_gets_nothing() -> None:
    call = request("POST", CHAT, chunks=[])
    call.gone.set()
    await send(small_app(), call)
    assert call.sent == []


async def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "BODY_TIMEOUT_S", 0.01)
    call = await send(small_app(), request("POST", CHAT, chunks=[]))
    assert call.status == 400  # SDKs would retry after a 408
    assert call.headers["connection"] == "close"


async def test_compressed_bodies_are_refused() -> None:
    call = await send(small_app(), request("POST", CHAT, HI, {"content-encoding": "gzip"}))
    assert call.status == 415
    assert call.body == []


async def test_v1_reads_json_whatever_its_content_type() -> None:
    call = await send(
        small_app(), request("POST", CHAT, HI, {"content-type": "application/x-www-form-urlencoded"})
    )
    assert call.status == 200


@pytest.mark.parametrize("given", ["abc-123", "x" * 128, "a!~"])
async def test_a_clients_request_id_comes_back(given: str) -> None:
    call = await send(small_app(), request("GET", "/health", headers={"x-request-id": given}))
    assert call.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a\nb", "é", "a b"])
async def test_an_unfit_request_id_is_replaced(given: str) -> None:
    call = request("GET", "/health")
    call.scope["headers"].append((b"x-request-id", given.encode()))
    await send(small_app(), call)
    assert len(call.headers["x-request-id"]) == 32


async def test_errors_and_streams_carry_the_request_id() -> None:
    for call in (
        request("GET", "/v1/nope", headers={"x-request-id": "r1"}),
        request("POST", CHAT, b"{", {"x-request-id": "r1"}),
        request("POST", CHAT, {**HI, "stream": True}, {"x-request-id": "r1"}),
    ):
        assert (await send(small_app(), call)).headers["x-request-id"] == "r1"


async def test_a_bug_is_a_plain_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    engine.submit = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    call = await send(scripted_app(engine), request("POST", CHAT, HI))
    assert call.status == 500
    assert call.json()["error"] == {
        "message": "Internal server error", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
    assert "ZeroDivisionError" in caplog.text
    assert engine.num_permits == 128


async def test_a_head_request_gets_the_headers_alone() -> None:
    get = await send(small_app(), request("GET", "/v1/models"))
    head = await send(small_app(), request("HEAD", "/v1/models"))
    assert head.status == 200
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_a_websocket_is_closed_if_the_server_cannot_answer_its_handshake() -> None:
    assert await _websocket({}) == [{"type": "websocket.close", "code": 1000}]


async def test_a_websocket_is_answered_with_the_status_after_which_codex_goes_on_by_http() -> None:
    start, body = await _websocket({"websocket.http.response": {}})
    assert start["status"] == 426
    assert (b"upgrade", b"HTTP/1.1") in start["headers"]
    assert orjson.loads(body["body"])["error"]["code"] == "websocket_not_supported"


async def _websocket(extensions: dict[str, Any]) -> list[Any]:
    sent: list[Any] = []

    async def collect(message: object) -> None:
        sent.append(message)

    scope = {"type": "websocket", "extensions": extensions}
    await small_app()(scope, asyncio.Queue[Message]().get, collect)
    return sent


async def test_a_large_body_is_handled_in_a_thread_and_a_small_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []

    def record(*args: Any, **options: Any) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        check_common(*args, **options)

    monkeypatch.setattr(chat, "check_common", record)
    app = scripted_app(ScriptedEngine())
    assert (await send(app, request("POST", CHAT, {**HI, "user": "x" * 300_000}))).status == 200
    assert (await send(app, request("POST", CHAT, HI))).status == 200
    assert threads == [False, True]
