"""OpenAI's Python SDK against the scripted engine over a socket: answers, streams, helpers, exceptions."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest

from tests.support.scripted_engine import Script, ScriptedEngine, fail_with, say, scripted_app
from tests.support.serving import serving
from tests.support.tool_app import sdk_of
from tests.support.waiting import LONGEST_S
from tgi_asgi.errors import GenerationFailed, Overloaded, TgiError, Unavailable
from tgi_asgi.settings import Settings

SYSTEM_AND_USER: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is deep learning?"},
]
SCRIPT = say("Deep", " learn", "ing", " 🦙"[:2], "!")


def sdk(script: Script = SCRIPT, **settings: Any) -> AbstractAsyncContextManager[openai.AsyncOpenAI]:
    return sdk_of(scripted_app(ScriptedEngine(script), Settings(**settings)))


async def test_the_guides_sync_calls() -> None:
    def call(url: str) -> tuple[str | None, str]:
        with openai.OpenAI(base_url=url + "/v1/", api_key="-") as client:
            whole = client.chat.completions.create(
                model="tgi", messages=SYSTEM_AND_USER, stream=False, max_tokens=120
            )
            text = ""
            with client.chat.completions.create(
                model="tgi", messages=SYSTEM_AND_USER, stream=True, max_tokens=120
            ) as stream:
                for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content, text

    async with serving(scripted_app(ScriptedEngine(SCRIPT))) as url:
        whole, streamed = await asyncio.to_thread(call, url)
    assert whole == streamed == "Deep learning 🦙!"


async def test_an_async_answer_is_fully_typed() -> None:
    async with sdk() as client:
        answer = await client.chat.completions.create(
            model="m", messages=SYSTEM_AND_USER, logprobs=True, top_logprobs=2, n=2
        )
    assert answer.model == "m"
    assert answer._request_id
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[1].logprobs is not None
    entries = answer.choices[1].logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == "Deep learning 🦙!"
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


@pytest.mark.parametrize("n", [1, 3])
async def test_the_stream_helper_accumulates_the_same_answer(n: int) -> None:
    async with sdk() as client:
        async with client.chat.completions.stream(
            model="m", messages=SYSTEM_AND_USER, n=n, logprobs=True,
            stream_options={"include_usage": True}, extra_body={"return_token_ids": True},
        ) as stream:  # fmt: skip
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_completion()
        whole = await client.chat.completions.create(model="m", messages=SYSTEM_AND_USER, n=n, logprobs=True)
    assert "content.done" in kinds
    assert streamed.usage == whole.usage
    assert streamed.system_fingerprint == "fp_toy"
    assert streamed.object == "chat.completion"
    for ours, theirs in zip(streamed.choices, whole.choices, strict=True):
        assert ours.message.content == theirs.message.content == "Deep learning 🦙!"
        assert ours.message.role == "assistant"
        assert ours.finish_reason == theirs.finish_reason
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert ours.logprobs.content == theirs.logprobs.content


async def test_raw_chunks_have_one_role_one_finish_and_usage_last() -> None:
    async with sdk() as client:
        stream = await client.chat.completions.create(
            model="m", messages=SYSTEM_AND_USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    *most, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert [chunk.choices[0].delta.role for chunk in most if chunk.choices[0].delta.role] == ["assistant"]
    assert [c.choices[0].finish_reason for c in most if c.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_text_completions() -> None:
    async with sdk() as client:
        answer = await client.completions.create(
            model="m", prompt=["a", "b"], n=2, logprobs=1, echo=True, max_tokens=10
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[3].text == "bDeep learning 🦙!"
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.token_logprobs is not None
        assert answer.choices[0].logprobs.token_logprobs[0] is None
        stream = await client.completions.create(model="m", prompt=[1, 2], stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert text == "Deep learning 🦙!"


async def test_models() -> None:
    async with sdk() as client:
        assert [model.id async for model in client.models.list()] == ["toy/model"]
        assert (await client.models.retrieve("toy/model")).created == 1_700_000_000
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.models.retrieve("org/other")


@pytest.mark.parametrize(
    ("script", "fields", "kind", "status"),
    [
        (SCRIPT, {"temperature": 3}, openai.BadRequestError, 400),
        (SCRIPT, {"max_tokens": 600}, openai.BadRequestError, 400),
        (SCRIPT, {"model": "other"}, openai.NotFoundError, 404),
        (SCRIPT, {"user": "x" * 40_000}, openai.APIStatusError, 413),
        (fail_with(Overloaded()), {}, openai.RateLimitError, 429),
        (fail_with(GenerationFailed("x")), {}, openai.InternalServerError, 500),
        (fail_with(Unavailable("x")), {}, openai.InternalServerError, 503),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_errors_become_the_sdks_exceptions(
    script: Script, fields: dict[str, Any], kind: type[openai.APIStatusError], status: int, is_stream: bool
) -> None:
    body = {"model": "tgi", "messages": SYSTEM_AND_USER, "stream": is_stream, **fields}
    async with sdk(script, strict_model_names=True, payload_limit=20_000) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**body)
    assert caught.value.status_code == status
    assert caught.value.request_id
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"]


async def test_a_wrong_key_is_an_authentication_error() -> None:
    async with sdk(api_key=("right",)) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
        right = client.with_options(api_key="right")
        assert (await right.models.list()).data


async def test_an_unknown_path_is_a_not_found_error_that_says_add_v1() -> None:
    async with sdk() as client:
        wrong = client.with_options(base_url=str(client.base_url).replace("/v1", ""))
        with pytest.raises(openai.NotFoundError, match="Add /v1"):
            await wrong.chat.completions.create(model="tgi", messages=SYSTEM_AND_USER)


@pytest.mark.parametrize("more", ["/v1", "/openai", "/engines/llama.cpp"])
async def test_a_base_url_with_more_before_v1_is_told_so(more: str) -> None:
    async with sdk() as client:
        wrong = client.with_options(base_url=str(client.base_url).replace("/v1", f"{more}/v1"))
        with pytest.raises(
            openai.NotFoundError, match=f"Take {more} from the base URL: /v1/chat/completions"
        ):
            await wrong.chat.completions.create(model="tgi", messages=SYSTEM_AND_USER)
        with pytest.raises(openai.NotFoundError) as caught:
            await wrong.post("/nothing", cast_to=object)
        assert "base URL" not in str(caught.value)


@pytest.mark.parametrize("error", [GenerationFailed("bad logits"), Overloaded()])
async def test_an_error_after_tokens_raises_with_its_message(error: TgiError) -> None:
    texts = []
    async with sdk(fail_with(error, after=say("a", "b"))) as client:
        stream = await client.chat.completions.create(model="m", messages=SYSTEM_AND_USER, stream=True)
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)
    assert texts == ["", "a", "b"]
    assert caught.value.message == error.message
    assert caught.value.code


async def test_the_sdk_retries_what_it_should() -> None:
    engine = ScriptedEngine(fail_with(Overloaded(retry_after_s=1)))
    async with (
        serving(scripted_app(engine)) as url,
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="-", max_retries=1) as client,
    ):
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="m", messages=SYSTEM_AND_USER)
    assert len(engine.channels) == 2


async def test_closing_a_stream_early_cancels_the_request() -> None:
    engine = ScriptedEngine(say("a", finish=None))
    engine.script = _slowly(engine.script)
    async with (
        serving(scripted_app(engine)) as url,
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="-") as client,
    ):
        stream = await client.chat.completions.create(model="m", messages=SYSTEM_AND_USER, stream=True)
        await anext(stream)
        await stream.close()
        await asyncio.wait_for(engine.channels[0].ended.wait(), LONGEST_S)
    assert engine.channels[0].is_cancelled


def _slowly(script: Script) -> Script:
    async def slow(channel: Any) -> Any:
        async for batch in script(channel):
            await asyncio.sleep(0.01)
            yield batch

    return slow
