"""The routes that SageMaker and Vertex AI call."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, ScriptedEngine, fail_with, say, scripted_app, toy_info
from tgi_asgi.errors import GenerationFailed, Unavailable
from tgi_asgi.settings import Settings

MESSAGES = [{"role": "user", "content": "hi"}]


async def post(path: str, body: Any, engine: ScriptedEngine | None = None, **settings: Any) -> httpx.Response:
    app = scripted_app(engine or ScriptedEngine(say("!")), Settings(**settings))
    async with client_of(app) as client:
        return await client.post(path, json=body)


async def test_invocations_with_inputs_answer_as_the_root_does() -> None:
    response = await post("/invocations", {"inputs": "hi", "parameters": {}})
    assert response.content == b'[{"generated_text":"hi!"}]'
    stream = await post("/invocations", {"inputs": "hi", "stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in stream.text


async def test_invocations_with_messages_answer_as_chat_does() -> None:
    response = await post("/invocations", {"messages": MESSAGES})
    assert response.json()["choices"][0]["message"]["content"] == "!"
    stream = await post("/invocations", {"messages": MESSAGES, "stream": True})
    assert stream.text.endswith("data: [DONE]\n\n")


async def test_invocations_with_a_prompt_answer_as_completions_do() -> None:
    response = await post("/invocations", {"prompt": "hi"})
    assert response.json()["object"] == "text_completion"
    assert response.json()["choices"][0]["text"] == "!"


@pytest.mark.parametrize(
    ("path", "body", "is_compat", "status"),
    [
        ("/invocations", b'{"inputs": "hi"}', False, 415),
        ("/invocations", b'{"prompt": "hi"}', False, 200),
        ("/invocations", b'{"messages": [{"role": "user", "content": "hi"}]}', False, 200),
        ("/invocations", b'{"prompt": "hi"}', True, 415),
        ("/tokenize", b'{"inputs": "hi"}', False, 415),
        ("/tokenize", b'{"prompt": "hi"}', False, 200),
    ],
)
async def test_only_requests_of_tgi_must_be_declared_to_be_json(
    path: str, body: bytes, is_compat: bool, status: int
) -> None:
    """Bodies for one of OpenAI's routes may have any content type, as on that route."""
    app = scripted_app(ScriptedEngine(say("!")), Settings(tgi_compat=is_compat))
    async with client_of(app) as client:
        response = await client.post(path, content=body, headers={"content-type": "text/plain"})
    assert response.status_code == status


async def test_inputs_win_over_messages_and_null_counts_as_absent() -> None:
    response = await post("/invocations", {"messages": MESSAGES, "inputs": "hi"})
    assert response.json() == [{"generated_text": "hi!"}]
    response = await post("/invocations", {"messages": MESSAGES, "inputs": None})
    assert "choices" in response.json()


@pytest.mark.parametrize(
    ("body", "settings", "status", "is_openai"),
    [
        ({}, {}, 422, False),
        ({"inputs": 1}, {}, 422, False),
        ({"messages": 1}, {}, 400, True),
        ({"messages": []}, {}, 400, True),
        ({"messages": 1}, {"tgi_compat": True}, 422, False),
        ({"prompt": 1}, {}, 400, True),
    ],
    ids=str,
)
async def test_refusals_of_invocations_speak_the_dialect_of_the_key(
    body: Any, settings: dict[str, Any], status: int, is_openai: bool
) -> None:
    response = await post("/invocations", body, **settings)
    assert response.status_code == status
    assert isinstance(response.json()["error"], dict if is_openai else str)


async def test_vertex_answers_texts_in_the_order_of_the_instances() -> None:
    engine = ScriptedEngine(say("a", "b"))
    body = {
        "instances": [
            {"inputs": "one", "parameters": {"max_new_tokens": 1}},
            {"messages": MESSAGES, "stream": True},
            {"inputs": "two", "parameters": {"top_k": 3, "return_full_text": True}},
        ]
    }
    response = await post("/vertex", body, engine)
    assert response.json() == {"predictions": ["a", "ab", "twoab"]}
    # Every parameter takes effect, not only max_new_tokens and seed.
    assert engine.requests[2].sampling.top_k == 3
    assert engine.requests[0].sampling.temperature == 0
    assert engine.num_permits == 128


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("tokens", "fields", "prediction"),
    [
        (["<think>", "hm", "</think>", "4"], {}, "4"),
        (["<think>", "hm"], {}, ""),
        (["4"], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "4"),
        ([CALL], {"tools": [{"type": "function", "function": {"name": "f"}}]}, None),
    ],
)
async def test_a_chat_s_prediction_is_what_chat_would_show(
    tokens: list[str], fields: dict[str, Any], prediction: str | None
) -> None:
    """It is the content without reasoning; a string can hold tool calls only as JSON."""
    info = toy_info(max_input_tokens=4095, max_total_tokens=4096)
    app = scripted_app(
        ScriptedEngine(say(*tokens)), info=info, chat_template=CHATML + "{# <think> </think> #}"
    )
    async with client_of(app) as client:
        response = await client.post("/vertex", json={"instances": [{"messages": MESSAGES, **fields}]})
    [found] = response.json()["predictions"]
    if prediction is not None:
        assert found == prediction
        return
    [call] = json.loads(found)
    assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": '{"a": 1}'})


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"inputs": "x", "parameters": {"top_p": 2}}, "instances[1]: `top_p` must be > 0.0 and < 1.0"),
        ({"inputs": 3}, "instances[1]: `inputs`"),
        ({"prompt": "x"}, "instances[1]: `inputs` or `messages` is required"),
        ({"messages": []}, "instances[1]: `messages`"),
        (7, "instances[1]: "),
    ],
    ids=str,
)
async def test_a_wrong_instance_fails_the_call_by_its_number(instance: Any, message: str) -> None:
    engine = ScriptedEngine()
    response = await post("/vertex", {"instances": [{"inputs": "x"}, instance]}, engine)
    assert response.status_code == 422
    assert message in response.json()["error"]
    assert engine.num_permits == 128
    assert engine.requests == []


async def test_vertex_tells_true_statuses() -> None:
    body = {"instances": [{"inputs": "a"}, {"inputs": "b"}]}
    assert (await post("/vertex", body, ScriptedEngine(num_permits=1))).status_code == 429
    failing = ScriptedEngine(fail_with(GenerationFailed("x")))
    assert (await post("/vertex", body, failing)).status_code == 424
    assert (await post("/vertex", {"instances": []})).status_code == 422


async def test_more_instances_than_ever_run_together_are_refused_for_good() -> None:
    body = {"instances": [{"inputs": "a"}] * 3}
    engine = ScriptedEngine(say("!"), num_permits=2)
    response = await post("/vertex", body, engine, max_concurrent_requests=2)
    assert response.status_code == 422
    assert "`instances` ask for 3 choices" in response.json()["error"]
    assert engine.num_permits == 2


async def test_a_permit_too_few_gives_the_others_back() -> None:
    engine = ScriptedEngine(num_permits=1)
    await post("/vertex", {"instances": [{"inputs": "a"}, {"inputs": "b"}]}, engine)
    assert engine.num_permits == 1


async def test_vertex_names_its_own_paths() -> None:
    settings = Settings(
        aip_predict_route="/v1/endpoints/7/deployedModels/9:predict", aip_health_route="/aip/health/"
    )
    async with client_of(scripted_app(ScriptedEngine(say("!")), settings)) as client:
        path = "/v1/endpoints/7/deployedModels/9:predict"
        response = await client.post(path, json={"instances": [{"inputs": "a"}]})
        assert response.json() == {"predictions": ["!"]}
        refused = await client.post(path, json={"instances": 3})
        assert isinstance(refused.json()["error"], str)
        assert (await client.get("/aip/health/")).status_code == 200


async def test_a_refused_chat_of_invocations_names_chats_field() -> None:
    response = await post("/invocations", {"messages": [{"role": "user", "content": "x" * 9999}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


async def test_ignored_keywords_are_told_once_for_all_instances() -> None:
    chat = {
        "messages": MESSAGES,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"format": "word"}}},
    }
    response = await post("/vertex", {"instances": [chat, chat]}, ScriptedEngine(say("1")))
    assert response.headers.get_list("x-tgi-ignored-keywords") == ["format"]


async def test_a_prompt_that_is_not_taken_gives_up_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    submit = engine.submit

    def once(*args: Any) -> Any:
        if engine.channels:
            raise Unavailable("the engine has died")
        return submit(*args)

    monkeypatch.setattr(engine, "submit", once)
    response = await post("/vertex", {"instances": [{"inputs": "one"}, {"inputs": "two"}]}, engine)
    assert response.status_code == 503
    assert [channel.is_cancelled for channel in engine.channels] == [True]
    assert engine.num_permits == 128


async def test_vertex_has_none_of_tgi_s_headers() -> None:
    response = await post("/vertex", {"instances": [{"inputs": "one"}]})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("x-") and name != "x-request-id"]
