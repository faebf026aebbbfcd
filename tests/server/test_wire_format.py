"""Guarantees on the wire, over a real socket: lengths, whole characters, stop strings, every refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.support.live_server import LiveServer
from tests.support.scripted_engine import Script, ScriptedEngine, fail_with, say, scripted_app, toy_info
from tests.support.server_process import PLAIN_CLIENT
from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, Overloaded, Unavailable
from tgi_asgi.settings import Settings

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
LLAMA = "🦙".encode()
WORDS = say("Deep", " le", "arn", "ing ", LLAMA[:1], LLAMA[1:3], LLAMA[3:], "!")
TEXT = "Deep learning 🦙!"


@contextmanager
def server(script: Script = WORDS, **settings: Any) -> Iterator[httpx.Client]:
    info = toy_info(max_total_tokens=4096, max_input_tokens=4095)
    permits = settings.pop("num_permits", 128)

    def make() -> Any:
        return scripted_app(ScriptedEngine(script, num_permits=permits), Settings(**settings), info=info)

    with LiveServer(make) as live, PLAIN_CLIENT(base_url=live.url, timeout=60) as client:
        yield client


def events(response: httpx.Response) -> list[Any]:
    """Return a stream's events; check that each is one `data:` line."""
    parameter = "; charset=utf-8" if response.url.path.startswith("/v1/") else ""  # TGI's streams had none
    assert response.headers["content-type"] == "text/event-stream" + parameter
    *frames, rest = response.content.split(b"\n\n")
    assert rest == b""
    assert all(frame.startswith(b"data: ") and b"\n" not in frame for frame in frames)
    return [item if item == b"[DONE]" else json.loads(item) for item in (frame[6:] for frame in frames)]


def test_1025_tokens_are_exactly_1025() -> None:
    """TGI re-queued after 1,024 tokens: 1,500 could yield 2,048, or end at 1,024."""
    native = {"inputs": "a", "parameters": {"max_new_tokens": 1025, "details": True}}
    with server(say("ab", finish=None)) as client:
        whole = client.post("/generate", json=native)
        assert whole.json()["details"]["generated_tokens"] == len(whole.json()["details"]["tokens"]) == 1025
        assert whole.headers["x-generated-tokens"] == "1025"
        stream = events(client.post("/generate_stream", json=native))
        assert len(stream) == stream[-1]["index"] == stream[-1]["details"]["generated_tokens"] == 1025
        chat = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1025}).json()
        assert chat["usage"]["completion_tokens"] == 1025
        assert chat["choices"][0]["message"]["content"] == "ab" * 1025
        assert chat["choices"][0]["finish_reason"] == "length"
        filled = client.post(CHAT, json={"messages": MESSAGES}).json()["usage"]
        assert filled["total_tokens"] == 4096


@pytest.mark.parametrize("stop", ["learning", "rn", "g ", "🦙!", "ning 🦙"])
def test_a_stop_string_is_found_wherever_tokens_end(stop: str) -> None:
    cut = TEXT[: TEXT.index(stop)]
    with server() as client:
        chat = {"messages": MESSAGES, "stop": [stop, "never"], "logprobs": True}
        choice = client.post(CHAT, json=chat).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (cut, "stop")
        *chunks, done = events(client.post(CHAT, json={**chat, "stream": True}))
        assert done == b"[DONE]"
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == cut
        native = client.post("/generate", json={"inputs": "a", "parameters": {"stop": [stop]}}).json()
        assert native["generated_text"] == cut + stop  # the native routes keep the stop string


def test_text_that_was_held_back_comes_at_the_end() -> None:
    with server() as client:
        body = {"messages": MESSAGES, "stop": ["!?", "g 🦙!!"], "stream": True}
        *chunks, done = events(client.post(CHAT, json=body))
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert done == b"[DONE]"
    assert "".join(texts) == TEXT
    assert texts[-1] == ""  # the finish chunk is separate
    assert not any("\ufffd" in text for text in texts)


def test_an_emoji_of_three_tokens_is_one_character_and_its_bytes_are_there() -> None:
    with server() as client:
        body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
        whole = client.post(CHAT, json=body).json()["choices"][0]
        data = b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]["content"])
        assert data.decode() == whole["message"]["content"] == TEXT
        *chunks, _ = events(client.post(CHAT, json={**body, "stream": True}))
        streamed: list[Any] = []
        for chunk in chunks:
            streamed += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        assert streamed == whole["logprobs"]["content"]
        tokens = events(client.post("/generate_stream", json={"inputs": "a"}))
        assert [token["token"]["text"] for token in tokens[4:7]] == ["", "", "🦙"]


def test_three_choices_have_one_id_and_open_in_order() -> None:
    with server() as client:
        body = {"messages": MESSAGES, "n": 3, "seed": 5, "stream": True}
        *chunks, _ = events(client.post(CHAT, json=body))
    assert len({chunk["id"] for chunk in chunks}) == 1
    opened = [chunk["choices"][0]["index"] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
    ended = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert opened == sorted(ended) == [0, 1, 2]


GENERATE = {"inputs": "a"}
REFUSALS: list[tuple[str, dict[str, Any], Any, int, int, str]] = [
    # name, settings and script, body change, native status, /v1 status, /v1 type
    ("a value", {}, {"temperature": -1}, 422, 400, "invalid_request_error"),
    ("busy", {"num_permits": 0}, {}, 429, 429, "rate_limit_error"),
    ("a failed engine", {"script": fail_with(GenerationFailed("x"))}, {}, 424, 500, "server_error"),
    ("an unfinished one", {"script": fail_with(IncompleteGeneration("x"))}, {}, 500, 500, "server_error"),
    ("one that goes away", {"script": fail_with(Unavailable("x"))}, {}, 503, 503, "server_error"),
    ("a late refusal", {"script": fail_with(Overloaded())}, {}, 429, 429, "rate_limit_error"),
    ("no key", {"api_key": ("k",)}, {}, 401, 401, "authentication_error"),
    ("size", {"payload_limit": 10}, {}, 413, 413, "invalid_request_error"),
]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("name", "setup", "change", "native", "v1", "kind"), REFUSALS, ids=[r[0] for r in REFUSALS]
)
def test_what_is_refused_before_the_first_token_has_its_true_status(
    name: str, setup: dict[str, Any], change: Any, native: int, v1: int, kind: str, is_stream: bool
) -> None:
    with server(**setup) as client:
        path = "/generate_stream" if is_stream else "/generate"
        first = client.post(path, json={**GENERATE, "parameters": change})
        assert first.status_code == native
        assert set(first.json()) == {"error", "error_type"}
        second = client.post(CHAT, json={"messages": MESSAGES, "stream": is_stream, **change})
        assert second.status_code == v1
        error = second.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == kind
        for response in (first, second):
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-request-id"]
            assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
            assert ("www-authenticate" in response.headers) == (response.status_code == 401)


@pytest.mark.parametrize("is_compat", [False, True])
def test_what_fails_after_the_first_token_is_an_event_and_then_done(is_compat: bool) -> None:
    script = fail_with(GenerationFailed("the device is gone"), after=say("a", "b"))
    with server(script, tgi_compat=is_compat) as client:
        *_, error = events(client.post("/generate_stream", json=GENERATE))
        assert error == {
            "error": "Request failed during generation: the device is gone", "error_type": "generation",
        }  # fmt: skip
        for path, body in ((CHAT, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "a"})):
            *chunks, error, done = events(client.post(path, json={**body, "stream": True}))
            assert done == b"[DONE]"
            assert all("error" not in chunk for chunk in chunks)
            assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks)
            prefix = "Request failed during generation: " if is_compat else ""
            assert error["error"]["message"] == f"{prefix}the device is gone"
            assert error["error"].get("http_status_code") == (424 if is_compat else None)


def test_unknown_paths_and_methods_have_their_api_s_envelope() -> None:
    with server() as client:
        for path, status in (("/nope", 404), ("/generate", 405)):
            response = client.get(path)
            assert response.status_code == status
            assert set(response.json()) == {"error", "error_type"}
        for path, status in (("/v1/nope", 404), ("/chat/completions", 404), (CHAT, 405)):
            response = client.get(path)
            assert response.status_code == status
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert client.get(CHAT).headers["allow"] == "POST"
        assert "/v1" in client.get("/chat/completions").json()["error"]["message"]
        assert (
            client.post("/generate", content="{}", headers={"content-type": "text/plain"}).status_code == 415
        )
