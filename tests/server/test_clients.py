"""The calls in users' guides, unchanged except for the port: curl and OpenAI's SDKs, on a real model."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.conftest import require_program, run_node
from tests.support.server_process import ServerProcess
from tgi_asgi.settings import DEMO_MODEL

MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is deep learning?"},
]


def _curl(demo: ServerProcess, path: str, body: object) -> str:
    """Post with curl as guides do; return the output."""
    command = [
        require_program("curl"), demo.url + path, "--silent", "--no-buffer", "--fail-with-body", "-X", "POST",
        "-H", "Content-Type: application/json", "-d", json.dumps(body),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _events(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data:") for line in lines), text
    return [line.removeprefix("data:").strip() for line in lines]


def test_curl_chat(demo: ServerProcess) -> None:
    body = {"model": "tgi", "messages": MESSAGES, "stream": False, "max_tokens": 20}
    answer = json.loads(_curl(demo, "/v1/chat/completions", body))
    assert answer["object"] == "chat.completion"
    assert answer["model"] == DEMO_MODEL  # "tgi" stands for the served model
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 20


def test_curl_chat_stream(demo: ServerProcess) -> None:
    body = {"model": "tgi", "messages": MESSAGES, "stream": True, "max_tokens": 20}
    *events, last = _events(_curl(demo, "/v1/chat/completions", body))
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["choices"] for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count(None) == len(chunks) - 1


def test_curl_generate_and_its_stream_and_the_root(demo: ServerProcess) -> None:
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 20}}
    text = json.loads(_curl(demo, "/generate", body))["generated_text"]
    events = [json.loads(event) for event in _events(_curl(demo, "/generate_stream", body))]
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == text
    assert 1 <= len(events) <= 20
    (root,) = json.loads(_curl(demo, "/", body))
    assert root["generated_text"] == body["inputs"] + text  # `/` returns the full text


def test_openai_python(client: OpenAI) -> None:
    completion = client.chat.completions.create(
        model="tgi", messages=MESSAGES, stream=False, max_tokens=30, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model="tgi", messages=MESSAGES, stream=True, max_tokens=30, temperature=0
        )
    )
    content = completion.choices[0].message.content
    assert content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 30


def test_openai_python_trailing_slash_models_and_usage(demo: ServerProcess) -> None:
    with OpenAI(base_url=demo.url + "/v1/", api_key="hf_something") as client:
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id).id == model.id
        chunks = list(
            client.chat.completions.create(
                model=model.id,
                messages=MESSAGES,
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_openai_python_seeds_logprobs_stop_and_n(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tgi", "messages": MESSAGES, "max_tokens": 12}
    once, again = (client.chat.completions.create(**options, seed=7, n=2) for _ in range(2))
    texts = [choice.message.content for choice in once.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]

    answer = client.chat.completions.create(**options, temperature=0, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    data = b"".join(bytes(token.bytes or ()) for token in logprobs.content)
    content = answer.choices[0].message.content
    assert content is not None
    assert data.decode().startswith(content)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in logprobs.content)

    word = content.split()[3]
    stopped = client.chat.completions.create(**options, temperature=0, stop=word)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == content[: content.index(word)]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "text"},
        {"messages": MESSAGES, "max_tokens": 0},
        {"messages": MESSAGES, "temperature": "hot"},
        {"messages": [{"role": "user", "content": "long " * 20_000}]},
    ],
    ids=["no messages", "messages not a list", "no tokens", "wrong type", "past the context"],
)
def test_a_bad_request_is_a_400_and_the_server_lives(client: OpenAI, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tgi", **body)
    assert caught.value.type == "invalid_request_error"
    assert client.chat.completions.create(model="tgi", messages=MESSAGES, max_tokens=1).choices


def test_a_body_that_is_no_json_is_a_400(demo: ServerProcess) -> None:
    answer = demo.post("/v1/chat/completions", content=b"{oops")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_64_streams_at_once_none_waits_for_another_s_end(demo: ServerProcess) -> None:
    """32 long streams start, then 32 short ones; a short one that waited for a long one would end last."""
    order: list[int] = []

    async def run(client: AsyncOpenAI, index: int) -> int:
        is_long = index < 32
        stream = await client.completions.create(
            model="tgi",
            prompt=f"Count: {index},",
            max_tokens=80 if is_long else 4,
            stream=True,
            temperature=0,
            extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )
        num_tokens = 0
        async for chunk in stream:
            num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        order.append(index)
        return num_tokens

    url = demo.url + "/v1"
    async with AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=300) as client:
        num_tokens = await asyncio.gather(*(run(client, index) for index in range(64)))
    assert num_tokens == [80] * 32 + [4] * 32
    assert set(order[:32]) == set(range(32, 64))


def test_openai_node(demo: ServerProcess) -> None:
    result = run_node("examples.mjs", demo.url + "/v1")
    assert result["whole"] == result["text"] != ""
    assert result["chunks"] > 1
    assert result["accumulated"] == {
        "text": result["whole"],
        "deltas": result["whole"],
        "role": "assistant",
        "finish": "length",
        "tokens": result["usage"],
    }
    assert result["continued"]
    assert result["names"] == [DEMO_MODEL] == [result["named"]]
    assert result["refusal"] == {"name": "BadRequestError", "status": 400, "type": "invalid_request_error"}
