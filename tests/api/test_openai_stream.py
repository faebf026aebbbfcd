"""Streams of `/v1`: order of chunks, keys, usage, n, merging, TGI compatibility."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.asgi import events_of, request, send
from tests.support.scripted_engine import Script, ScriptedEngine, fail_with, say, scripted_app
from tests.support.toy_tokenizer import EOS
from tgi_asgi.errors import GenerationFailed
from tgi_asgi.settings import Settings

HI = [{"role": "user", "content": "hi"}]
LLAMA = "🦙".encode()


async def stream(script: Script, path: str = "/v1/chat/completions", **fields: Any) -> list[Any]:
    """Return a stream's events; check and drop its end mark."""
    settings = fields.pop("settings", None)
    body = ({"messages": HI} if "chat" in path else {"prompt": "hi"}) | {"stream": True, **fields}
    call = await send(scripted_app(ScriptedEngine(script), settings), request("POST", path, body))
    assert call.status == 200, call.content
    assert call.is_complete
    events = events_of(call.content)
    assert events[-1] == "[DONE]"
    assert "[DONE]" not in events[:-1]
    return events[:-1]


async def whole(script: Script, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    body = ({"messages": HI} if "chat" in path else {"prompt": "hi"}) | fields
    return (await send(scripted_app(ScriptedEngine(script)), request("POST", path, body))).json()


def deltas(events: list[Any], index: int = 0) -> list[dict[str, Any]]:
    return [c["delta"] for e in events for c in e["choices"] if c["index"] == index]


def finishes(events: list[Any], index: int = 0) -> list[str | None]:
    return [c["finish_reason"] for e in events for c in e["choices"] if c["index"] == index]


async def test_a_chat_stream_opens_with_the_role_and_ends_with_a_finish_chunk() -> None:
    events = await stream(say("Hel", "lo"))
    assert deltas(events) == [
        {"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {"content": ""},
    ]  # fmt: skip
    assert finishes(events) == [None, None, None, "stop"]
    first = {name: events[0][name] for name in ("id", "created", "model", "system_fingerprint", "object")}
    assert first["object"] == "chat.completion.chunk"
    for event in events:
        assert {name: event[name] for name in first} == first
        assert "usage" not in event
        assert set(event["choices"][0]) - {"stop_reason"} == {"index", "delta", "logprobs", "finish_reason"}


async def test_no_chunk_without_choices_is_sent_unasked() -> None:
    fields: dict[str, Any]
    for fields in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        assert all(event["choices"] for event in await stream(say("a"), **fields))


async def test_include_usage_adds_one_last_chunk_and_nulls() -> None:
    *chunks, last = await stream(say("a", "b"), n=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    expected = await whole(say("a", "b"), n=2)
    assert last["usage"] == expected["usage"]
    assert last["usage"]["completion_tokens"] == 6
    assert last["system_fingerprint"] == "fp_toy"


async def test_continuous_usage_counts_up_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(say("a", "b", "c"), stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] >= 0
    assert counts[-1] == 4
    assert events[-1]["choices"] == []


async def test_continuous_usage_needs_include_usage() -> None:
    events = await stream(say("a"), stream_options={"continuous_usage_stats": True})
    assert all("usage" not in event for event in events)


async def test_choices_open_in_order_and_each_finishes_once() -> None:
    events = await stream(say("a", "b"), n=3)
    indices = [event["choices"][0]["index"] for event in events]
    assert indices[:3] == [0, 1, 2]
    assert all("role" in deltas(events, i)[0] for i in range(3))
    for i in range(3):
        assert [d["content"] for d in deltas(events, i)] == ["", "a", "b", ""]
        assert [f for f in finishes(events, i) if f] == ["stop"]
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"stop": "STOP"}, {"stop": "z"}, {"stop": ["lo, S", "xx"]}, {"max_tokens": 3},
        {"stop": "STOP", "include_stop_str_in_output": True}, {"logprobs": True, "top_logprobs": 2},
        {"n": 2, "stop": "three"},
    ],
)  # fmt: skip
async def test_deltas_join_to_the_whole_answer(path: str, fields: dict[str, Any]) -> None:
    script = say("Hel", "lo, ", LLAMA[:1], LLAMA[1:3], LLAMA[3:], " ST", "OP", " th", "ree", "!", b"\xf0\x9f")
    is_chat = "chat" in path
    if not is_chat and fields.get("logprobs"):
        fields = {"logprobs": 2}
    events = await stream(script, path, **fields)
    body = await whole(script, path, **fields)
    for choice in body["choices"]:
        mine = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        text = "".join(c["delta"]["content"] if is_chat else c["text"] for c in mine)
        assert text == (choice["message"]["content"] if is_chat else choice["text"])
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"] is not None:
            joined: dict[str, list[Any]] = {}
            for part in (c["logprobs"] for c in mine if c["logprobs"]):
                for key, values in part.items():
                    joined.setdefault(key, []).extend(values or [])
            assert joined == {key: values or [] for key, values in choice["logprobs"].items()}


async def test_a_character_is_never_split_and_no_chunk_is_empty() -> None:
    events = await stream(say("a", LLAMA[:2], LLAMA[2:], "b"))
    assert [d["content"] for d in deltas(events)] == ["", "a", "🦙", "b", ""]


async def test_a_torn_character_at_the_end_is_a_replacement_character() -> None:
    events = await stream(say("a", LLAMA[:2]))
    assert [d["content"] for d in deltas(events)] == ["", "a", "\ufffd", ""]


async def test_only_the_possible_head_of_a_stop_string_is_held_back() -> None:
    events = await stream(say("a S", "T", "x", " ST"), stop="STOP")
    assert [d["content"] for d in deltas(events)] == ["", "a ", "STx", " ", "ST", ""]


async def test_role_and_logprobs_never_share_a_chunk() -> None:
    events = await stream(say("a"), logprobs=True)
    assert events[0]["choices"][0]["logprobs"] is None
    assert events[1]["choices"][0]["logprobs"]["content"][0]["token"] == "a"


async def test_text_streams_have_no_role_and_number_choices_by_prompt() -> None:
    events = await stream(say("a", "b"), "/v1/completions", prompt=["x", "y"], n=2)
    assert {event["object"] for event in events} == {"text_completion"}
    for index in range(4):
        mine = [c for e in events for c in e["choices"] if c["index"] == index]
        assert [c["text"] for c in mine] == ["a", "b", ""]
        assert [c["finish_reason"] for c in mine] == [None, None, "stop"]
    assert {c["index"] for e in events for c in e["choices"]} == {0, 1, 2, 3}


async def test_an_echoed_text_stream_starts_with_the_prompt() -> None:
    events = await stream(say("a"), "/v1/completions", prompt=["x", "yy"], echo=True)
    for index, expected in enumerate((["x", "a", ""], ["yy", "a", ""])):
        assert [c["text"] for e in events for c in e["choices"] if c["index"] == index] == expected


async def test_token_ids_travel_at_the_choice_and_prompt_ids_once() -> None:
    events = await stream(say("a", "b"), return_token_ids=True)
    assert [("prompt_token_ids" in event) for event in events] == [True, False, False, False]
    ids = [c["token_ids"] for e in events for c in e["choices"] if "token_ids" in c]
    assert ids == [[97], [98], [EOS]]
    assert all(set(delta) <= {"role", "content"} for delta in deltas(events))
    events = await stream(say("a"), "/v1/completions", return_token_ids=True)
    assert events[0]["choices"][0]["prompt_token_ids"] == [104, 105]
    # Clients of vLLM, whose chunks all have tokens, read the list of every chunk.
    assert [c["token_ids"] for e in events for c in e["choices"]] == [[], [97], [EOS]]


async def test_echo_of_a_continued_message_comes_after_the_role() -> None:
    messages = [*HI, {"role": "assistant", "content": "The"}]
    events = await stream(say(" end"), messages=messages, echo=True)
    assert [d["content"] for d in deltas(events)] == ["", "The", " end", ""]


async def test_an_error_after_tokens_is_an_error_object_before_the_end_mark() -> None:
    *chunks, error = await stream(fail_with(GenerationFailed("bad logits"), after=say("a", "b")))
    assert [d["content"] for d in deltas(chunks)] == ["", "a", "b"]
    assert error == {
        "error": {
            "message": "bad logits", "type": "server_error", "param": None, "code": "generation_failed",
        }
    }  # fmt: skip


async def test_compat_streams_please_strict_old_clients() -> None:
    compat = Settings(tgi_compat=True)
    events = await stream(say("a", "b"), settings=compat)
    assert all(event["usage"] is None for event in events)
    assert all(delta["role"] == "assistant" for delta in deltas(events))
    events = await stream(say("a", "b"), "/v1/completions", settings=compat, stop=["b"])
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == ["", "stop_sequence"]  # `finish_reason: str` in TGI's types
    assert [event["choices"][0]["text"] for event in events] == ["a", ""]
    for path in ("/v1/chat/completions", "/v1/completions"):
        events = await stream(fail_with(GenerationFailed("x"), after=say("a")), path, settings=compat)
        message = "Request failed during generation: x"
        assert events[-1] == {"error": {"message": message, "http_status_code": 424}}


@pytest.mark.parametrize("options", [None, {"include_usage": True, "continuous_usage_stats": True}])
async def test_compat_completions_end_each_prompt_with_its_usage(options: dict[str, Any] | None) -> None:
    """As TGI did, whatever the `stream_options`; its other chunks have no such key."""
    events = await stream(
        say("a", "b"), "/v1/completions", settings=Settings(tgi_compat=True), prompt=["xyz", "x"],
        stream_options=options,
    )  # fmt: skip
    usages = {event["choices"][0]["index"]: event["usage"] for event in events if "usage" in event}
    assert len([event for event in events if "usage" in event]) == 2
    assert usages == {
        0: {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
        1: {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
    }
    ends = [event["choices"][0]["finish_reason"] != "" for event in events]
    assert ends == ["usage" in event for event in events]
