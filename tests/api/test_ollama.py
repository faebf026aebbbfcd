"""`/api`: Ollama's Python package over a socket, lines, counts and durations, and refused requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, cast

import httpx
import ollama
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, Script, ScriptedChannel, ScriptedEngine, fail_with, say
from tests.support.serving import serving
from tests.support.tool_app import CALLS, CITY, THINKING, app_of
from tests.support.waiting import LONGEST_S
from tgi_asgi.api.ollama.request import OllamaOptions
from tgi_asgi.errors import GenerationFailed, Overloaded
from tgi_asgi.settings import Settings
from tgi_asgi.types import GenerationRequest

HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
THOUGHT = ["<think>", "hm", "</think>", "\n"]
# A template that prints all its inputs.
SHOWING = (
    "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{% if tools %}{% endif %}"
    "{% if enable_thinking is defined %}think={{ enable_thinking }} {{ reasoning_effort }}{% endif %}"
)


@asynccontextmanager
async def sdk(
    engine: ScriptedEngine | None = None, *, template: str | None = CHATML, **options: Any
) -> AsyncIterator[ollama.AsyncClient]:
    app = app_of(engine or ScriptedEngine(say("Hel", "lo")), Settings(**options), chat_template=template)
    async with serving(app) as url, ollama.AsyncClient(url) as client:
        yield client


async def post(
    path: str, body: Any, script: Script | None = None, *, template: str | None = CHATML, **options: Any
) -> tuple[int, list[Any], GenerationRequest | None]:
    """Return the status, the lines, and the request that the engine received."""
    engine = ScriptedEngine(script or say("a", "b"))
    app = app_of(engine, Settings(**options), chat_template=template)
    async with client_of(app) as client:
        # curl sends the content type of a form.
        form = {"content-type": "application/x-www-form-urlencoded"}
        answer = await client.post(path, content=json.dumps(body), headers=form)
    assert answer.text.endswith("\n") or answer.status_code >= 400
    lines = [json.loads(line) for line in answer.text.removesuffix("\n").split("\n")]
    assert engine.num_permits == 128
    return answer.status_code, lines, engine.requests[0] if engine.requests else None


async def prompt_of(body: dict[str, Any], path: str = "/api/chat", template: str | None = SHOWING) -> str:
    _, _, request = await post(path, body, template=template)
    assert request is not None
    return bytes(i for i in request.prompt_ids if i < 256).decode()


async def test_a_chat_through_the_package() -> None:
    async with sdk() as client:
        answer = await client.chat("m", HI, options={"num_predict": 20})
    assert (answer.model, answer.message.role, answer.message.content) == ("m", "assistant", "Hello")
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.message.thinking is None and answer.message.tool_calls is None


async def test_a_stream_adds_up_to_the_same_and_ends_with_its_counts() -> None:
    async with sdk() as client:
        whole = await client.chat("m", HI)
        *most, last = [line async for line in await client.chat("m", HI, stream=True)]
    assert [line.message.content for line in most] == ["Hel", "lo"]
    assert not any(line.done or line.done_reason or line.eval_count for line in most)
    assert (last.done, last.done_reason, last.message.content) == (True, "stop", "")
    assert (last.eval_count, last.prompt_eval_count) == (3, whole.prompt_eval_count)
    assert whole.eval_count == 3


async def test_counts_and_durations_are_those_of_the_engine() -> None:
    async def script(channel: ScriptedChannel) -> AsyncIterator[Any]:
        stats = channel.stats
        stats.arrival_s -= 10.0
        stats.scheduled_s = stats.arrival_s + 2.0
        stats.first_token_s = stats.scheduled_s + 3.0
        async for batch in say("a", "b")(channel):
            yield batch

    _, [answer], request = await post("/api/chat", {"messages": HI, "stream": False}, script)
    assert request is not None
    assert answer["prompt_eval_count"] == len(request.prompt_ids)
    assert answer["eval_count"] == 3
    assert answer["load_duration"] == pytest.approx(2e9)
    assert answer["prompt_eval_duration"] == pytest.approx(3e9)
    assert answer["eval_duration"] >= 5e9 - 1  # the script's times are five seconds ago
    assert all(type(answer[f"{name}_duration"]) is int for name in ("total", "load", "prompt_eval", "eval"))


async def test_lines_are_json_with_the_time_in_utc() -> None:
    engine = ScriptedEngine()
    async with client_of(app_of(engine)) as client:
        answer = await client.post("/api/generate", json={"model": "m", "prompt": "hi"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    *lines, end = answer.text.split("\n")
    assert end == ""
    for line in map(json.loads, lines):
        assert line["model"] == "m" and line["created_at"].endswith("Z")
        assert datetime.fromisoformat(line["created_at"]).tzinfo is not None


async def test_calls_are_whole_and_their_results_go_back() -> None:
    engine = ScriptedEngine(say(*CALLS))
    async with sdk(engine) as client:
        whole = await client.chat("m", HI, tools=TOOLS)
        *most, last = [line async for line in await client.chat("m", HI, tools=TOOLS, stream=True)]
        messages: list[Any] = [*HI, whole.message]
        for call in whole.message.tool_calls or ():
            messages.append({"role": "tool", "content": "sunny", "tool_name": call.function.name})
        engine.script = say("Fine.")
        final = await client.chat("m", messages, tools=TOOLS)
    assert whole.message.content == "Let me see."
    assert "".join(line.message.content or "" for line in most) == "Let me see."
    assert last.message.tool_calls is None
    streamed = [call for line in most for call in line.message.tool_calls or ()]
    for calls in (whole.message.tool_calls or (), streamed):
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("weather", {"city": "Paris"}), ("now", {}),
        ]  # fmt: skip
    assert engine.requests[0].grammar is not None
    assert final.message.content == "Fine."


async def test_calls_have_ids_for_clients_that_read_them() -> None:
    _, [answer], _ = await post("/api/chat", {"messages": HI, "tools": TOOLS, "stream": False}, say(*CALLS))
    one, other = (call["id"] for call in answer["message"]["tool_calls"])
    assert one.startswith("call_") and one != other


async def test_a_choice_of_tools_is_kept() -> None:
    """Ollama ignores it; AI SDK's provider sends it, and fails if the model then calls nothing."""
    engine = ScriptedEngine(say(*CALLS))
    async with serving(app_of(engine, chat_template=SHOWING)) as url, httpx.AsyncClient() as client:
        for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}, "none"):
            body = {"messages": HI, "tools": TOOLS, "tool_choice": choice, "stream": False}
            assert (await client.post(url + "/api/chat", json=body)).status_code == 200
        unknown = {"messages": HI, "tools": TOOLS, "tool_choice": "absent"}
        assert (await client.post(url + "/api/chat", json=unknown)).status_code == 400
    of_auto, of_required, of_name, of_none = (request.grammar for request in engine.requests)
    assert of_none is None and of_required is not None and of_name not in (None, of_required, of_auto)


async def test_half_a_call_is_none() -> None:
    body = {"messages": HI, "tools": TOOLS, "stream": False, "options": {"num_predict": 6}}
    _, [answer], _ = await post("/api/chat", body, say(*CALLS[4:]))
    assert answer["done_reason"] == "length"
    assert "tool_calls" not in answer["message"]


async def test_messages_are_given_to_the_template_with_ids_for_calls() -> None:
    def called(**more: Any) -> dict[str, Any]:
        return {"function": {"name": "now", "arguments": {"a": 1}}, **more}

    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "thinking": "hm", "tool_calls": [called()]},
        {"role": "tool", "content": "12:00", "tool_name": "now"},
        {"role": "assistant", "content": "", "tool_calls": [called(id="c1")]},
        {"role": "tool", "content": "12:01", "tool_name": "now"},
        {"role": "tool", "content": "12:02", "tool_call_id": "c2"},
    ]
    shown = (await prompt_of({"messages": messages})).splitlines()
    user, first, result, second, *results = [json.loads(line) for line in shown if line.startswith("{")]
    assert user == messages[0]
    assert first["reasoning_content"] == "hm"
    assert first["tool_calls"][0]["id"] == result["tool_call_id"] == "now"
    assert first["tool_calls"][0]["function"] == {"name": "now", "arguments": {"a": 1}}
    assert result["name"] == "now" and result["content"] == "12:00"
    assert second["tool_calls"][0]["id"] == results[0]["tool_call_id"] == "c1"
    assert results[1]["tool_call_id"] == "c2"


@pytest.mark.parametrize(("form", "says"), [(CITY, '{"city": "x"}'), ("json", '{"a": 1}')])
async def test_a_format_reaches_the_engine_as_a_grammar(form: Any, says: str) -> None:
    engine = ScriptedEngine(say(says))
    async with sdk(engine) as client:
        assert (await client.chat("m", HI, format=form)).message.content == says
        assert (await client.generate("m", "hi", format=form)).response == says
        await client.generate("m", "hi", format=form, raw=True)
        await client.chat("m", HI, format="")
    assert [request.grammar is not None for request in engine.requests] == [True, True, True, False]


async def test_thoughts_are_told_apart_and_hidden_where_they_are_unwanted() -> None:
    async with sdk(ScriptedEngine(say(*THOUGHT, "Yes")), template=THINKING) as client:
        chat = await client.chat("m", HI, think=True)
        answer = await client.generate("m", "hi", think="low")
        stream = [line async for line in await client.generate("m", "hi", stream=True)]
        hidden = await client.chat("m", HI, think=False)
    assert (chat.message.thinking, chat.message.content) == ("hm", "Yes")
    assert (answer.thinking, answer.response) == ("hm", "Yes")
    assert "".join(line.thinking or "" for line in stream) == "hm"
    assert "".join(line.response or "" for line in stream) == "Yes"
    assert (hidden.message.thinking, hidden.message.content) == (None, "Yes")


@pytest.mark.parametrize(
    ("think", "shown"),
    [(None, None), (True, "think=True "), (False, "think=False "), ("high", "think=True high")],
)
@pytest.mark.parametrize("body", [{"messages": HI}, {"prompt": "hi"}])
async def test_think_is_told_to_the_template(think: Any, shown: str | None, body: dict[str, Any]) -> None:
    path = "/api/chat" if "messages" in body else "/api/generate"
    last = (await prompt_of({**body, "think": think}, path)).splitlines()[-1]
    assert last == shown if shown is not None else last.startswith("{")


async def test_a_last_message_of_the_assistant_is_continued() -> None:
    prompt = await prompt_of({"messages": [*HI, {"role": "assistant", "content": "I am"}]}, template=CHATML)
    assert prompt.endswith("assistant\nI am")


async def test_generate_makes_a_chat_of_a_prompt() -> None:
    engine = ScriptedEngine(say("Hel", "lo"))
    async with sdk(engine) as client:
        answer = await client.generate("m", "hi", system="Be brief.")
        stream = [line async for line in await client.generate("m", "hi", stream=True)]
    assert (answer.response, answer.done_reason, answer.eval_count) == ("Hello", "stop", 3)
    assert [line.response for line in stream] == ["Hel", "lo", ""]
    assert [line.done for line in stream] == [False, False, True]
    prompt = await prompt_of({"prompt": "hi", "system": "Be brief."}, "/api/generate")
    assert prompt.split("\n")[:2] == [
        '{"role": "system", "content": "Be brief."}', '{"role": "user", "content": "hi"}'
    ]  # fmt: skip


@pytest.mark.parametrize(("raw", "template"), [(True, CHATML), (False, None)])
async def test_a_raw_prompt_or_one_without_a_template_is_the_text_itself(raw: bool, template: Any) -> None:
    assert await prompt_of({"prompt": "hi <b>", "raw": raw}, "/api/generate", template) == "hi <b>"


async def test_options_reach_the_engine() -> None:
    options = {
        "temperature": 0.1, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.7, "repeat_penalty": 1.5,
        "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": 7, "num_predict": 9, "stop": ["x"],
        "num_ctx": 8192, "num_gpu": 1, "mirostat": 0,
    }  # fmt: skip
    _, _, request = await post("/api/chat", {"messages": HI, "options": options})
    assert request is not None
    sampling, stop = request.sampling, request.stop
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.1, 3, 0.5, 0.2)
    assert (sampling.typical_p, sampling.repetition_penalty, sampling.seed) == (0.7, 1.5, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert (stop.max_tokens, stop.stop) == (9, ("x",))


async def test_integers_may_have_a_point_and_are_cut() -> None:
    options = {"top_k": 3.0, "seed": 7.9, "num_predict": 9e0}
    _, _, request = await post("/api/chat", {"messages": HI, "options": options})
    assert request is not None
    assert (request.sampling.top_k, request.sampling.seed, request.stop.max_tokens) == (3, 7, 9)


@pytest.mark.parametrize("num_predict", [None, -1, -2, 0, 10**30, 1e300])
async def test_defaults_are_ollamas_and_the_context_bounds_the_answer(num_predict: float | None) -> None:
    options = {"num_predict": num_predict, "seed": -1, "top_k": None}
    _, _, request = await post("/api/generate", {"prompt": "hi", "raw": True, "options": options})
    assert request is not None
    assert (request.sampling.temperature, request.sampling.top_p) == (0.8, 0.9)
    assert request.sampling.repetition_penalty == 1.0
    assert request.sampling.seed != -1 % 2**63  # but a random one
    assert request.stop.max_tokens == 4096 - 2
    _, _, request = await post("/api/chat", {"messages": HI})
    assert request is not None and request.sampling.top_k == 40


async def test_null_means_ollamas_default() -> None:
    options = dict.fromkeys(OllamaOptions.__struct_fields__)
    _, _, request = await post("/api/chat", {"messages": HI, "options": options})
    assert request is not None
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.8, 40, 0.9)


@pytest.mark.parametrize(("options", "reason"), [({"num_predict": 1}, "length"), ({"stop": ["b"]}, "stop")])
async def test_the_reason_to_stop(options: dict[str, Any], reason: str) -> None:
    _, lines, _ = await post("/api/chat", {"messages": HI, "options": options})
    assert [line["message"]["content"] for line in lines] == ["a", ""]
    assert lines[-1]["done_reason"] == reason


@pytest.mark.parametrize(
    ("keep_alive", "reason"),
    [("5m", "load"), (None, "load"), (-1, "load"), (0.5, "load"), ("10s", "load"),
     (0, "unload"), (0.0, "unload"), ("0", "unload"), ("0s", "unload"), ("0.0h", "unload")],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_a_request_to_load_or_unload_is_answered_at_once(
    path: str, keep_alive: Any, reason: str
) -> None:
    status, [answer], request = await post(path, {"model": "m", "keep_alive": keep_alive})
    assert (status, answer["done"], answer["done_reason"], answer["model"]) == (200, True, reason, "m")
    assert request is None
    if path == "/api/chat":
        assert answer["message"] == {"role": "assistant", "content": ""}
    else:
        assert answer["response"] == ""


async def test_what_is_said_of_the_model() -> None:
    template = THINKING + "{% if tools %}{% endif %}"
    async with sdk(template=template) as client:
        for listed in (await client.list(), await client.ps()):
            [model] = listed.models
            assert model.model == "toy/model" and model.digest is not None and len(model.digest) == 64
            assert model.details is not None and model.details.family == "ToyForCausalLM"
        shown = await client.show("toy/model")
        assert await client.show("toy/model:latest") == shown
        assert await client.show("other") == shown  # LlamaIndex asks before it chats, whatever the name
        [running] = (await client.ps()).models
    assert running.context_length == 4096
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.template == template
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "ToyForCausalLM"
    assert shown.modelinfo["ToyForCausalLM.context_length"] == 4096
    assert shown.modified_at is not None and shown.modified_at.timestamp() == 1_700_000_000


async def test_a_model_without_a_template_can_only_complete() -> None:
    async with sdk(template=None) as client:
        shown = await client.show("toy/model")
    assert (shown.template, shown.capabilities) == ("", ["completion"])


async def test_the_version_is_one_that_clients_accept() -> None:
    """VS Code's Copilot asks for 0.6.4, others for 0.14."""
    async with client_of(app_of(ScriptedEngine())) as client:
        version = (await client.get("/api/version")).json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 14, 0)


async def test_errors_become_the_packages_exceptions() -> None:
    async def refused(engine: ScriptedEngine, **options: Any) -> ollama.ResponseError:
        async with sdk(engine, **options) as client:
            with pytest.raises(ollama.ResponseError) as caught:
                await client.chat("other", HI, stream=False)
            with pytest.raises(ollama.ResponseError) as streamed:
                async for _ in await client.chat("other", HI, stream=True):
                    pass
        assert (streamed.value.error, streamed.value.status_code) == (
            caught.value.error,
            caught.value.status_code,
        )
        return caught.value

    failed = await refused(ScriptedEngine(fail_with(GenerationFailed("broken"))))
    assert (failed.error, failed.status_code) == ("broken", 500)
    assert (await refused(ScriptedEngine(num_permits=0))).status_code == 429
    assert (await refused(ScriptedEngine(), api_key=("right",))).status_code == 401
    unknown = await refused(ScriptedEngine(), strict_model_names=True)
    assert (unknown.error, unknown.status_code) == ("model 'other' not found", 404)
    async with sdk(strict_model_names=True) as client:
        with pytest.raises(ollama.ResponseError, match="model 'other' not found") as caught:
            await client.show("other")
        assert caught.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="/api/pull") as caught:
            await client.pull("other")
        assert caught.value.status_code == 404


async def test_an_unknown_path_is_refused_in_ollamas_envelope() -> None:
    for chosen, status in ((Settings(), 404), (Settings(api_key=("right",)), 401)):
        async with client_of(app_of(ScriptedEngine(), settings=chosen)) as client:
            answer = await client.post("/api/push")
        assert (answer.status_code, list(answer.json())) == (status, ["error"])


@pytest.mark.parametrize("error", [GenerationFailed("broken"), Overloaded()])
async def test_a_failure_after_the_start_is_a_line(error: GenerationFailed | Overloaded) -> None:
    texts = []
    async with sdk(ScriptedEngine(fail_with(error, say("a", "b")))) as client:
        with pytest.raises(ollama.ResponseError) as caught:
            async for line in await client.chat("m", HI, stream=True):
                texts.append(line.message.content)
    assert texts == ["a", "b"]
    assert caught.value.error == error.message


@pytest.mark.parametrize(
    ("path", "fields", "status", "says"),
    [
        ("chat", {"messages": [{"role": "user", "images": ["aGk="]}]}, 400, "messages[0].images"),
        ("chat", {"messages": [{"role": "x", "content": "x"}]}, 400, "messages[0].role"),
        ("chat", {"messages": "hi"}, 400, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "messages"),
        ("chat", {"messages": HI, "tools": [{"type": "function", "function": {"name": "a b"}}]}, 400,
         "tools[0].function.name"),
        ("chat", {"messages": HI, "options": {"top_p": 2}}, 400, "options.top_p"),
        ("chat", {"messages": HI, "options": {"temperature": -1}}, 400, "options.temperature"),
        ("chat", {"messages": HI, "options": {"stop": [""]}}, 400, "options.stop[0]"),
        ("chat", {"messages": HI, "format": "xml"}, 400, "format"),
        ("chat", {"messages": HI, "format": {"type": "x"}}, 400, "format"),
        ("chat", {"messages": HI, "think": "a bit"}, 400, "think"),
        ("chat", {"messages": HI, "logprobs": 1}, 400, "logprobs"),
        ("chat", {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ("generate", {"prompt": "x", "logprobs": True, "top_logprobs": -1}, 400, "top_logprobs"),
        ("chat", {"messages": HI, "model": "m" * 300}, 400, "model"),
        ("generate", {"prompt": "x" * 9000}, 400, "prompt"),
        ("generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("generate", {"prompt": "x", "context": [1, 2]}, 400, "context"),
        ("generate", {"prompt": "x", "images": ["aGk="]}, 400, "images"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "system"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, 403, "template"),
        ("show", {}, 400, "model"),
        ("show", {"name": "m" * 300}, 400, "model"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field(path: str, fields: dict[str, Any], status: int, says: str) -> None:
    got, [error], request = await post(f"/api/{path}", fields)
    assert (got, request) == (status, None)
    assert list(error) == ["error"]
    assert says in error["error"]


async def test_log_probabilities_through_the_package() -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    async with sdk(ScriptedEngine(say("Hel", "l", "o, you"))) as client:
        chat = await client.chat("m", HI, options={"stop": [", y"]}, **options)
        lines = [line async for line in await client.chat("m", HI, stream=True, **options)]
        made = await client.generate("m", "hi", logprobs=True)
        plain = await client.generate("m", "hi", top_logprobs=2)
    streamed = [entry for line in lines for entry in line.logprobs or ()]
    assert [entry.token for entry in streamed] == ["Hel", "l", "o, you"]
    assert lines[0].logprobs == streamed[:1] and lines[-1].logprobs is None
    assert chat.message.content == "Hello" and list(chat.logprobs or ()) == streamed
    assert all(len(entry.top_logprobs or ()) == 2 for entry in streamed)
    assert streamed[0].top_logprobs and streamed[0].top_logprobs[0].token == "Hel"
    assert [entry.top_logprobs for entry in made.logprobs or ()] == [None] * 3
    assert plain.logprobs is None


async def test_calls_have_no_log_probabilities() -> None:
    _, [answer], _ = await post(
        "/api/chat", {"messages": HI, "stream": False, "tools": TOOLS, "logprobs": True}, say(*CALLS)
    )
    assert "".join(entry["token"] for entry in answer["logprobs"]).startswith("Let me see")
    assert not any("weather" in entry["token"] for entry in answer["logprobs"])


async def test_a_model_is_described_by_its_older_field_too() -> None:
    engine = ScriptedEngine()
    async with client_of(app_of(engine)) as client:
        older, newer = [
            (await client.post("/api/show", json=body)).json() for body in ({"name": "m"}, {"model": "m"})
        ]
    assert older == newer and older["capabilities"] == ["completion"]


async def test_the_loaded_model_never_expires() -> None:
    async with sdk() as client:
        [model] = (await client.ps()).models
    assert model.expires_at is not None and model.expires_at.year > 2300
    assert model.size_vram == 0


async def test_leaving_a_stream_frees_the_request() -> None:
    engine = ScriptedEngine()

    async def stuck(channel: ScriptedChannel) -> AsyncIterator[Any]:
        async for batch in say("a", finish=None)(channel):
            yield batch
            await channel.ended.wait()

    engine.script = stuck
    async with sdk(engine) as client:
        stream = await client.chat("m", HI, stream=True)
        await anext(stream)
        await cast(AsyncGenerator[object, None], stream).aclose()
        await asyncio.wait_for(engine.channels[0].ended.wait(), LONGEST_S)
    assert engine.channels[0].is_cancelled
    assert engine.num_permits == 128
