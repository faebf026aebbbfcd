"""Native answers, byte for byte where TGI's clients are strict."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

import tgi_asgi
from tests.support.client import client_of
from tests.support.scripted_engine import (
    Script,
    ScriptedChannel,
    ScriptedEngine,
    fail_with,
    say,
    scripted_app,
    toy_info,
)
from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, FinishReason, TokenEvent


def parameters(**given: Any) -> dict[str, Any]:
    return {"inputs": "hi", "parameters": given}


async def post(path: str, body: Any, script: Script | None = None, **settings: Any) -> Any:
    async with client_of(scripted_app(ScriptedEngine(script), Settings(**settings))) as client:
        return await client.post(path, json=body)


def events_of(text: str) -> list[dict[str, Any]]:
    """Parse a native stream, and check TGI's framing."""
    assert text.endswith("\n\n")
    frames = text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


async def test_generate_answers_with_the_text_alone() -> None:
    response = await post("/generate", parameters(), say("Hel", "lo"))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.content == b'{"generated_text":"Hello"}'


async def test_details_have_tgis_keys_in_tgis_order() -> None:
    response = await post("/generate", parameters(details=True, top_n_tokens=1), say("a"))
    assert response.content == (
        b'{"generated_text":"a","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,'
        b'"prefill":[],'
        b'"tokens":[{"id":97,"text":"a","logprob":-0.5,"special":false},'
        b'{"id":257,"text":"</s>","logprob":-0.5,"special":true}],'
        b'"top_tokens":[[{"id":97,"text":"a","logprob":-0.5,"special":false}],'
        b'[{"id":257,"text":"</s>","logprob":-0.5,"special":true}]]}}'
    )


async def test_a_stream_has_tgis_frames_and_no_done() -> None:
    response = await post("/generate_stream", parameters(details=True), say("Hel", "lo"))
    assert response.headers["content-type"] == "text/event-stream"  # old clients compare it exactly
    assert response.content == (
        b'data: {"index":1,"token":{"id":260,"text":"Hel","logprob":-0.5,"special":false},'
        b'"generated_text":null,"details":null}\n\n'
        b'data: {"index":2,"token":{"id":261,"text":"lo","logprob":-0.5,"special":false},'
        b'"generated_text":null,"details":null}\n\n'
        b'data: {"index":3,"token":{"id":257,"text":"</s>","logprob":-0.5,"special":true},'
        b'"generated_text":"Hello","details":{"finish_reason":"eos_token","generated_tokens":3,"seed":null,'
        b'"input_length":2}}\n\n'
    )


async def test_a_stream_without_details_ends_with_null_details() -> None:
    events = events_of((await post("/generate_stream", parameters(), say("a"))).text)
    assert events[-1]["generated_text"] == "a"
    assert events[-1]["details"] is None


async def test_top_tokens_of_a_stream_stand_between_token_and_text() -> None:
    response = await post("/generate_stream", parameters(top_n_tokens=2), say("b"))
    first = response.content.split(b"\n\n")[0]
    assert first == (
        b'data: {"index":1,"token":{"id":98,"text":"b","logprob":-0.5,"special":false},'
        b'"top_tokens":[{"id":98,"text":"b","logprob":-0.5,"special":false},'
        b'{"id":97,"text":"a","logprob":-1.5,"special":false}],"generated_text":null,"details":null}'
    )


async def test_a_character_over_several_tokens_comes_whole_with_the_last_of_them() -> None:
    emoji = "🦙".encode()
    script = say("x", emoji[:2], emoji[2:3], emoji[3:], finish=FinishReason.EOS)
    events = events_of((await post("/generate_stream", parameters(), script)).text)
    assert [event["token"]["text"] for event in events[:-1]] == ["x", "", "", "🦙"]
    assert events[-1]["generated_text"] == "x🦙"


async def test_texts_of_tokens_concatenate_to_the_whole_text() -> None:
    response = await post("/generate", parameters(details=True), say("naï", 've \u2028"\\\n', "✓"))
    body = response.json()
    texts = [token["text"] for token in body["details"]["tokens"] if not token["special"]]
    assert "".join(texts) == body["generated_text"] == 'naïve \u2028"\\\n✓'


async def test_a_stop_string_over_tokens_ends_the_text_and_stays_in_it() -> None:
    script = say("one ", "ST", "OP", " two", finish=None)
    body = parameters(stop=["STOP"], details=True)
    answer = (await post("/generate", body, script)).json()
    assert answer["generated_text"] == "one STOP"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    events = events_of((await post("/generate_stream", body, script)).text)
    # Nothing is held back: each token is shown when it arrives.
    assert [event["token"]["text"] for event in events] == ["one ", "ST", "OP"]
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"


async def test_the_token_budget_ends_with_length() -> None:
    body = parameters(max_new_tokens=2, details=True)
    answer = (await post("/generate", body, say("a", "b", "c"))).json()
    assert answer["generated_text"] == "ab"
    assert answer["details"]["finish_reason"] == "length"
    assert answer["details"]["generated_tokens"] == 2


async def test_the_seed_is_shown_only_where_it_was_used() -> None:
    greedy = (await post("/generate", parameters(details=True, seed=42))).json()
    assert greedy["details"]["seed"] is None
    sampled = (await post("/generate", parameters(details=True, seed=2**64 - 1, do_sample=True))).json()
    assert sampled["details"]["seed"] == 2**64 - 1
    sampled = (await post("/generate", parameters(details=True, do_sample=True))).json()
    assert 0 <= sampled["details"]["seed"] < 2**53


async def test_the_root_answers_with_an_array_and_the_full_text() -> None:
    assert (await post("/", {"inputs": "hi"}, say("!"))).content == b'[{"generated_text":"hi!"}]'
    assert (await post("/", parameters(return_full_text=False), say("!"))).json() == [{"generated_text": "!"}]


async def test_the_root_streams_when_the_body_says_so() -> None:
    response = await post("/", {"inputs": "hi", "stream": True}, say("!"))
    assert events_of(response.text)[-1]["generated_text"] == "hi!"


async def test_full_text_is_the_clients_choice_elsewhere() -> None:
    assert (await post("/generate", parameters(return_full_text=True), say("!"))).json() == {
        "generated_text": "hi!"
    }
    response = await post("/generate_stream", parameters(return_full_text=True), say("!"))
    assert events_of(response.text)[-1]["generated_text"] == "hi!"


def two_choices(*logprobs: float) -> Script:
    """Return a script with one token per choice, with these log-probabilities."""

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        yield [
            TokenEvent(i, 97 + i, b"", "ab"[i], logprob, finish=FinishReason.LENGTH)
            for i, logprob in enumerate(logprobs)
        ]

    return script


@pytest.mark.parametrize(("logprobs", "best", "other"), [((-2.0, -1.0), "b", "a"), ((-1.0, -1.0), "a", "b")])
async def test_best_of_returns_the_likeliest_and_lists_the_others(
    logprobs: tuple[float, float], best: str, other: str
) -> None:
    body = parameters(best_of=2, do_sample=True, details=True)
    answer = (await post("/generate", body, two_choices(*logprobs))).json()
    assert answer["generated_text"] == best
    [loser] = answer["details"]["best_of_sequences"]
    assert loser["generated_text"] == other
    assert list(loser) == [
        "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens",
    ]  # fmt: skip


async def test_each_of_best_of_s_sequences_has_a_seed_of_its_own() -> None:
    engine = ScriptedEngine(two_choices(-2.0, -1.0))
    body = parameters(best_of=2, do_sample=True, details=True)
    async with client_of(scripted_app(engine)) as client:
        details = (await client.post("/generate", json=body)).json()["details"]
    [loser] = details["best_of_sequences"]
    assert engine.requests[0].seeds == (loser["seed"], details["seed"])
    assert loser["seed"] != details["seed"]
    engine.script = say("a")
    async with client_of(scripted_app(engine)) as client:
        await client.post("/generate", json=parameters(do_sample=True))
    assert engine.requests[1].seeds == ()


async def test_best_of_without_details_drops_the_others() -> None:
    response = await post("/generate", parameters(best_of=2, do_sample=True), two_choices(-1.0, -2.0))
    assert response.json() == {"generated_text": "a"}
    assert response.headers["x-generated-tokens"] == "1"


async def test_a_logprob_that_is_not_finite_is_null() -> None:
    for value in (float("-inf"), float("nan")):
        answer = await post("/generate", parameters(details=True), two_choices(value))
        assert answer.json()["details"]["tokens"][0]["logprob"] is None
        stream = await post("/generate_stream", parameters(), two_choices(value))
        assert events_of(stream.text)[0]["token"]["logprob"] is None


def with_prefill(script: Script) -> Script:
    async def wrapped(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        if channel.request.prompt_logprobs is not None:
            count = len(channel.request.prompt_ids)
            channel.stats.prompt_logprobs = [(None, []), *((-float(i), []) for i in range(1, count))]
        async for batch in script(channel):
            yield batch

    return wrapped


async def test_prefill_shows_the_prompt_where_the_administrator_allows_it() -> None:
    body = parameters(decoder_input_details=True)
    refused = await post("/generate", body, with_prefill(say("a")))
    assert refused.json()["details"]["prefill"] == []
    allowed = await post("/generate", body, with_prefill(say("a")), enable_prefill_logprobs=True)
    assert allowed.json()["details"]["prefill"] == [
        {"id": 104, "text": "h", "logprob": None},
        {"id": 105, "text": "i", "logprob": -1.0},
    ]


SYNC_HEADERS = {
    "x-compute-type", "x-compute-time", "x-compute-characters", "x-total-time", "x-validation-time",
    "x-queue-time", "x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-generated-tokens",
}  # fmt: skip


async def test_whole_answers_carry_tgis_headers() -> None:
    response = await post("/generate", {"inputs": "🦙 hi"}, say("a"), compute_type="4-nvidia-l4")
    headers = {name: value for name, value in response.headers.items() if name in SYNC_HEADERS}
    assert set(headers) == SYNC_HEADERS
    assert headers["x-compute-type"] == "4-nvidia-l4"
    assert headers["x-compute-characters"] == "4"
    assert float(headers["x-compute-time"]) > 0
    assert headers["x-prompt-tokens"] == "7"
    assert headers["x-generated-tokens"] == "2"
    assert all(headers[f"x-{name}"].isdigit() for name in ("total-time", "queue-time", "time-per-token"))


async def test_streams_carry_the_headers_known_before_the_first_token() -> None:
    response = await post("/generate_stream", {"inputs": "hi"}, say("a"))
    assert {name for name in response.headers if name.startswith("x-")} == {
        "x-compute-type", "x-compute-characters", "x-accel-buffering", "x-request-id",
    }  # fmt: skip
    assert response.headers["x-compute-type"] == "1-cpu"
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (
            GenerationFailed("out of memory"),
            424,
            {"error": "Request failed during generation: out of memory", "error_type": "generation"},
        ),
        (
            IncompleteGeneration("Incomplete generation"),
            500,
            {"error": "Incomplete generation", "error_type": "incomplete_generation"},
        ),
    ],
    ids=["failed", "incomplete"],
)
async def test_a_failure_before_the_first_token_has_its_true_status(
    path: str, error: TgiError, status: int, body: dict[str, str]
) -> None:
    response = await post(path, parameters(), fail_with(error))
    assert (response.status_code, response.json()) == (status, body)


async def test_a_failure_after_the_first_token_is_the_streams_last_event() -> None:
    response = await post("/generate_stream", parameters(), fail_with(GenerationFailed("x"), say("a", "b")))
    assert response.status_code == 200
    events = events_of(response.text)
    assert [event.get("index") for event in events] == [1, 2, None]
    assert events[-1] == {"error": "Request failed during generation: x", "error_type": "generation"}


async def test_a_failure_inside_a_whole_answer_has_its_true_status() -> None:
    response = await post("/generate", parameters(), fail_with(GenerationFailed("x"), say("a", "b")))
    assert response.status_code == 424


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_while_the_model_loads_requests_get_503(path: str) -> None:
    app = scripted_app(ScriptedEngine())
    app.context.served = None
    async with client_of(app) as client:
        response = await client.post(path, json=parameters())
        assert response.status_code == 503
        assert response.json()["error_type"] == "unavailable"
        assert int(response.headers["retry-after"]) > 0
        assert (await client.get("/")).status_code == 503


async def test_while_draining_health_and_requests_get_503() -> None:
    engine = ScriptedEngine()
    engine.state = EngineState.DRAINING
    async with client_of(scripted_app(engine)) as client:
        assert (await client.post("/generate", json=parameters())).status_code == 503
        assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
async def test_health_is_an_empty_200(path: str) -> None:
    async with client_of(scripted_app(ScriptedEngine())) as client:
        response = await client.get(path)
        assert (response.status_code, response.content) == (200, b"")
        assert (await client.head(path)).status_code == 200


@pytest.mark.parametrize("path", ["/info", "/health", "/metrics", "/tokenizer_info", "/v1/models"])
async def test_get_routes_answer_head_without_a_body(path: str) -> None:
    async with client_of(scripted_app(ScriptedEngine())) as client:
        get, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("path", ["/generate/", "/generate_stream/"])
async def test_a_trailing_slash_is_the_same_route(path: str) -> None:
    assert (await post(path, parameters())).status_code == 200


async def test_info_has_no_limits_beyond_what_a_request_may_have() -> None:
    settings = Settings(max_best_of=500, max_client_batch_size=500)
    async with client_of(scripted_app(ScriptedEngine(), settings)) as client:
        info = (await client.get("/info")).json()
        too_many = {"model": "tgi", "prompt": ["a"] * 129, "max_tokens": 1}
        refused = (await client.post("/v1/completions", json=too_many)).json()["error"]
    assert (info["max_best_of"], info["max_client_batch_size"]) == (128, 128)
    assert refused["param"] == "prompt" and "128" in refused["message"]


async def test_info_has_tgis_keys_and_the_effective_limits() -> None:
    app = scripted_app(
        ScriptedEngine(), Settings(max_stop_sequences=9), info=toy_info(kv_tokens=4096, device="cuda")
    )
    async with client_of(app) as client:
        info = (await client.get("/info")).json()
    assert info["model_id"] == "toy/model"
    assert info["model_sha"] == "abc123"
    assert (info["router"], info["version"]) == ("text-generation-router", "3.3.7")
    assert info["tgi_asgi_version"] == tgi_asgi.__version__
    assert (info["max_best_of"], info["max_stop_sequences"]) == (2, 9)
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (511, 512)
    assert (info["max_batch_total_tokens"], info["model_device_type"]) == (4096, "cuda")
    assert {
        "model_pipeline_tag", "max_concurrent_requests", "validation_workers", "max_client_batch_size",
        "sha", "docker_label",
    } <= set(info)  # fmt: skip


async def test_the_parameters_absent_rule_reaches_the_engine() -> None:
    engine = ScriptedEngine(say("a"))
    async with client_of(scripted_app(engine)) as client:
        await client.post("/generate", json={"inputs": "hi"})
        await client.post("/generate", json={"inputs": "hi", "parameters": None})
        await client.post("/generate", json={"inputs": "hi", "parameters": {}})
    assert [request.sampling.temperature == 0 for request in engine.requests] == [False, False, True]
