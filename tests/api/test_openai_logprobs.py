"""Log-probability entries: exact bytes, released and trimmed together with their text."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.asgi import events_of, request, send
from tests.support.scripted_engine import LOGPROB, ScriptedChannel, ScriptedEngine, say, scripted_app
from tests.support.toy_tokenizer import ToyTokenizer
from tgi_asgi.api.openai.logprobs import ChatLogprobs, CompletionLogprobs, TokenNames
from tgi_asgi.engine.output import ChoiceOutput
from tgi_asgi.errors import TgiError
from tgi_asgi.runner.plan import Sampled
from tgi_asgi.types import FinishReason, StopConditions, TokenEvent

HI = [{"role": "user", "content": "hi"}]
LLAMA = "🦙".encode()


def as_sent(taken: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a client reads of a choice's log-probabilities."""
    return dict(orjson.loads(orjson.dumps(taken or {})))


async def entries(*tokens: str | bytes, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HI, "logprobs": True, **fields}
    call = await send(
        scripted_app(ScriptedEngine(say(*tokens))), request("POST", "/v1/chat/completions", body)
    )
    [choice] = call.json()["choices"]
    assert choice["logprobs"]["refusal"] is None
    return list(choice["logprobs"]["content"])


async def test_an_entry_has_token_logprob_bytes_and_a_list() -> None:
    assert await entries("é") == [
        {"token": "é", "logprob": LOGPROB, "bytes": [0xC3, 0xA9], "top_logprobs": []}
    ]
    [entry] = await entries("x", top_logprobs=2)
    assert entry["top_logprobs"] == [
        {"token": "x", "logprob": LOGPROB, "bytes": [120]},
        {"token": "a", "logprob": LOGPROB - 1, "bytes": [97]},
    ]


async def test_bytes_join_to_the_text_and_eos_is_left_out() -> None:
    found = await entries("a", LLAMA[:1], LLAMA[1:3], LLAMA[3:], "z")
    assert bytes(b for entry in found for b in entry["bytes"]).decode() == "a🦙z"
    assert [entry["token"] for entry in found] == ["a", r"bytes:\xf0", r"bytes:\x9f\xa6", r"bytes:\x99", "z"]


async def test_tokens_wholly_inside_cut_text_are_dropped_and_a_partly_cut_one_stays() -> None:
    found = await entries("a", "b S", "T", "OP", "c", stop="STOP")
    assert [entry["token"] for entry in found] == ["a", "b S"]
    found = await entries("a", "b S", "T", "OP", stop="STOP", include_stop_str_in_output=True)
    assert [entry["token"] for entry in found] == ["a", "b S", "T", "OP"]


async def test_an_answer_without_text_has_no_entries() -> None:
    assert await entries("STOP", stop="STOP") == []


async def test_a_stop_token_has_no_entry() -> None:
    assert [entry["token"] for entry in await entries("a", "b", stop_token_ids=[98])] == ["a"]


async def test_tokens_can_be_spelled_as_ids() -> None:
    [entry] = await entries("a", top_logprobs=1, return_tokens_as_token_ids=True)
    assert entry["token"] == "token_id:97"
    assert entry["top_logprobs"][0]["token"] == "token_id:97"


async def test_held_back_entries_travel_with_their_text() -> None:
    body = {"messages": HI, "stream": True, "logprobs": True, "stop": "STOP"}
    engine = ScriptedEngine(say("S", "T", "x", "S"))
    call = await send(scripted_app(engine), request("POST", "/v1/chat/completions", body))
    chunks = [event["choices"][0] for event in events_of(call.content)[:-1]]
    found = [
        (c["delta"]["content"], [e["token"] for e in (c["logprobs"] or {"content": []})["content"]])
        for c in chunks
    ]
    assert found == [("", []), ("STx", ["S", "T", "x"]), ("S", ["S"]), ("", [])]
    assert chunks[0]["logprobs"] is chunks[-1]["logprobs"] is None


async def test_infinities_become_a_number() -> None:
    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        top = [(97, -math.inf), (98, math.nan)]
        yield [TokenEvent(0, 97, b"a", "a", -math.inf, top, finish=FinishReason.LENGTH)]

    for path, fields in (
        ("/v1/chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": "x", "logprobs": 2}),
    ):
        call = await send(scripted_app(ScriptedEngine(script)), request("POST", path, fields))
        assert call.content.count(b"-9999.0") >= 3
        assert b"null" not in call.content.split(b'"logprobs":')[1].split(b"}]")[0]


def test_of_two_tokens_that_read_alike_the_larger_value_is_kept() -> None:
    class Alike(ToyTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b"a" if token_id in (1, 2) else super().token_bytes(token_id)

    tracker = CompletionLogprobs(TokenNames(Alike()), 2, "")  # type: ignore[arg-type]
    tracker.push(TokenEvent(0, 1, b"a", "a", -2.0, [(2, -0.5), (1, -2.0)], finish=FinishReason.LENGTH))
    taken = as_sent(tracker.take())
    assert taken["top_logprobs"] == [{"a": -0.5}]
    assert taken["token_logprobs"] == [-2.0]


def test_a_token_whose_first_space_is_not_shown_has_one_name() -> None:
    tracker = CompletionLogprobs(TokenNames(ToyTokenizer()), 1, "")  # type: ignore[arg-type]
    token_id = ToyTokenizer().id_of(b" a")
    tracker.push(TokenEvent(0, token_id, b"a", "a", -2.0, [(token_id, -2.0)], finish=FinishReason.LENGTH))
    taken = as_sent(tracker.take())
    assert (taken["tokens"], taken["top_logprobs"]) == (["a"], [{"a": -2.0}])
    assert tracker.take() is None


def test_the_token_that_ends_a_grammar_has_its_entry() -> None:
    tokenizer = ToyTokenizer()
    output = ChoiceOutput(0, StopConditions(max_tokens=9), tokenizer, tokenizer.eos_ids)
    tracker = ChatLogprobs(TokenNames(tokenizer))  # type: ignore[arg-type]
    tracker.push(output.push(Sampled(ord("Y"), -0.5, is_last=True)))
    assert [entry["token"] for entry in as_sent(tracker.take())["content"]] == ["Y"]


@pytest.mark.parametrize(
    ("prompt", "tokens", "offsets"),
    [
        ("<s>hi</s>!", ["<s>", "h", "i", "</s>", "!"], [0, 3, 4, 5, 9]),  # as the prompt contains them
        ("hi", ["<s>", "h", "i"], [0, 0, 1]),  # added by the tokenizer
        ("one two", [" ", "two"], [3, 4]),  # of a truncated prompt
        ("a\ufffd", ["a", LLAMA[:1]], [0, 1]),
    ],
)
def test_tokens_of_an_echo_begin_where_its_text_has_them(
    prompt: str, tokens: list[str | bytes], offsets: list[int]
) -> None:
    tokenizer = ToyTokenizer()
    ids = [tokenizer.id_of(token if isinstance(token, bytes) else token.encode()) for token in tokens]
    tracker = CompletionLogprobs(TokenNames(tokenizer), 0, prompt)  # type: ignore[arg-type]
    tracker.push_prompt(ids, [(-1.0, ())] * len(ids), tokenizer.special_ids)
    tracker.push(TokenEvent(0, ord("z"), b"z", "z", -1.0, finish=FinishReason.LENGTH))
    assert as_sent(tracker.take())["text_offset"] == [*offsets, len(prompt)]


PIECES = st.lists(
    st.one_of(
        st.text("abS🦙é", min_size=1, max_size=3).map(str.encode),
        st.binary(min_size=1, max_size=3),
        st.sampled_from([LLAMA[:1], LLAMA[1:], b"ST", b"OP", b"</s>"]),
    ),
    max_size=12,
)


@given(PIECES, st.sampled_from([(), ("STOP",), ("ab", "b🦙")]), st.booleans(), st.booleans())
def test_released_entries_cover_the_text_whatever_the_tokens(
    pieces: list[bytes], stop: tuple[str, ...], include_stop: bool, is_whole: bool
) -> None:
    tokenizer = ToyTokenizer()
    conditions = StopConditions(max_tokens=len(pieces) + 1, stop=stop, include_stop=include_stop)
    output = ChoiceOutput(0, conditions, tokenizer, tokenizer.eos_ids)
    tracker = ChatLogprobs(TokenNames(tokenizer))  # type: ignore[arg-type]
    text = ""
    released: list[dict[str, Any]] = []
    for piece in [*pieces, b"</s>"]:
        event = output.push(Sampled(tokenizer.id_of(piece), -0.5))
        text += event.text
        tracker.push(event)
        released += as_sent(tracker.take()).get("content", [])
        if event.finish is None:
            decoded = bytes(b for e in released for b in e["bytes"]).decode("utf-8", "replace")
            assert decoded.startswith(text.removesuffix("\ufffd"))
        else:
            break
    data = bytes(b for e in released for b in e["bytes"])
    if event.finish is FinishReason.STOP and not include_stop:
        assert data.decode("utf-8", "replace").startswith(text.rstrip("\ufffd"))
    elif event.finish is not FinishReason.STOP:
        assert data.decode("utf-8", "replace") == text
