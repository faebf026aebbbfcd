"""The requests of `vllm bench serve` (0.32), and every field that it reads, by its own parsing rules."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.support.scripted_engine import Script, ScriptedEngine, say, scripted_app
from tests.support.serving import serving

TOKENS = (" Deep", " learn", "ing", " ", " 🦙".encode()[:3], " 🦙".encode()[3:], "\n\n", '"data: "', "!")
WORDS = b"".join(token.encode() if isinstance(token, str) else token for token in TOKENS).decode()
NUM_TOKENS = 12  # more than the script has: `ignore_eos` must continue past its end


@dataclass
class Output:
    """The contents of the benchmark's `RequestFuncOutput` after a request."""

    status: int = 0
    text: str = ""
    num_chunks: int = 0  # the first gives the time to first token, each later one an inter-token latency
    output_tokens: int | None = None
    prompt_len: int | None = None
    usage_events: list[dict[str, Any]] = field(default_factory=list)
    is_done: bool = False


def completion_payload(prompt: Any) -> dict[str, Any]:
    """Return the body of its `openai` backend."""
    return {
        "model": "served/name",
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": NUM_TOKENS,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }


def chat_payload(prompt: str) -> dict[str, Any]:
    """Return the body of its `openai-chat` backend: content is a list of parts."""
    return {
        "model": "served/name",
        "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
        "max_completion_tokens": NUM_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }


async def bench(url: str, payload: dict[str, Any]) -> tuple[Output, httpx.Headers]:
    """Post and read the stream as the benchmark does, which strips whitespace around each read."""
    output = Output()
    decoder = codecs.getincrementaldecoder("utf-8")()
    buffer = ""
    headers = {"Content-Type": "application/json", "x-request-id": "benchmark-serving-0"}
    async with (
        httpx.AsyncClient(timeout=30, verify=False) as client,
        client.stream("POST", url, json=payload, headers=headers) as response,
    ):
        output.status = response.status_code
        if output.status != 200:
            return output, response.headers
        async for read in response.aiter_raw():
            buffer += decoder.decode(read.strip())
            *messages, buffer = buffer.split("\n\n")
            if buffer.startswith("data: "):  # it tries to parse the rest as a whole message
                rest = buffer.removeprefix("data: ")
                if rest == "[DONE]" or _is_json(rest):
                    messages.append(buffer)
                    buffer = ""
            for message in messages:
                _take(output, message.strip())
    assert buffer == ""
    return output, response.headers


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _take(output: Output, message: str) -> None:
    if not message or message.startswith(":"):
        return
    assert message.startswith("data: ")  # with the space, and on one line
    data = message.removeprefix("data: ")
    if data == "[DONE]":
        output.is_done = True
        return
    assert not output.is_done
    event = json.loads(data)
    if choices := event.get("choices"):
        assert not output.usage_events, "usage must come last"
        text = choices[0]["delta"].get("content") if "delta" in choices[0] else choices[0].get("text")
        output.text += text or ""
        output.num_chunks += 1
    elif usage := event.get("usage"):
        output.usage_events.append(usage)
        output.output_tokens = usage.get("completion_tokens")
        output.prompt_len = usage.get("prompt_tokens")


async def run(path: str, payload: dict[str, Any], script: Script | None = None) -> tuple[Output, Any]:
    engine = ScriptedEngine(script or say(*TOKENS))
    async with serving(scripted_app(engine)) as url:
        output, headers = await bench(url + path, payload)
        if output.status == 200:
            assert headers["content-type"].startswith("text/event-stream")
        assert headers["x-request-id"] == "benchmark-serving-0"
    return output, engine.requests[0] if engine.requests else None


@pytest.mark.parametrize(
    ("path", "payload", "num_prompt"),
    [
        ("/v1/completions", completion_payload("Hello"), 5),
        ("/v1/completions", completion_payload([72, 101, 108]), 3),  # --skip-tokenizer-init sends ids
        ("/v1/chat/completions", chat_payload("Hello"), 24),
    ],
    ids=["text", "ids", "chat"],
)
async def test_every_field_that_the_benchmark_reads_is_there(
    path: str, payload: dict[str, Any], num_prompt: int
) -> None:
    output, request = await run(path, payload)
    assert output.status == 200
    assert output.is_done
    assert output.text == WORDS
    assert output.output_tokens == NUM_TOKENS  # all sampled tokens, with EOS past the script's end
    assert output.prompt_len == num_prompt == len(request.prompt_ids)
    assert len(output.usage_events) == 1
    assert 2 <= output.num_chunks <= NUM_TOKENS + 2  # no chunk without choices counts as a token


async def test_its_sampling_fields_mean_what_they_say() -> None:
    _, request = await run("/v1/completions", completion_payload("Hello"))
    assert request.sampling.temperature == 0
    assert request.sampling.repetition_penalty == 1
    assert request.sampling.logprobs is None
    assert request.stop.ignore_eos
    assert request.stop.max_tokens == NUM_TOKENS


async def test_a_list_of_one_part_has_the_tokens_of_the_plain_text() -> None:
    as_list, with_list = await run("/v1/chat/completions", chat_payload("Hello"))
    plain = {**chat_payload("Hello"), "messages": [{"role": "user", "content": "Hello"}]}
    as_text, with_text = await run("/v1/chat/completions", plain)
    assert list(with_list.prompt_ids) == list(with_text.prompt_ids)
    assert as_list.text == as_text.text


async def test_a_single_token_still_gives_a_first_chunk_and_usage() -> None:
    output, _ = await run("/v1/completions", {**completion_payload("Hello"), "max_tokens": 1})
    assert output.num_chunks >= 1  # otherwise the benchmark counts the request as failed
    assert output.output_tokens == 1


async def test_a_model_that_says_nothing_at_all_still_gives_a_first_chunk() -> None:
    output, _ = await run("/v1/chat/completions", {**chat_payload("Hello"), "ignore_eos": False}, say())
    assert output.num_chunks >= 1
    assert output.output_tokens == 1


async def test_a_refusal_is_a_status_and_not_an_event() -> None:
    output, _ = await run("/v1/completions", {**completion_payload("Hello"), "max_tokens": 10_000})
    assert output.status == 400
