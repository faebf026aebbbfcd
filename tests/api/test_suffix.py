"""`suffix` of `/v1/completions` and Ollama's `/api/generate`: models of code fill in between two texts."""

from __future__ import annotations

from typing import Any

import ollama
import pytest

from tests.support.asgi import Call, request, send
from tests.support.scripted_engine import CHATML, ScriptedEngine, say, scripted_app
from tests.support.serving import serving
from tests.support.tool_app import app_of
from tests.support.toy_tokenizer import ToyTokenizer

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def filling_engine(*words: str) -> ScriptedEngine:
    """Return the engine of a model of code, which knows what is between two texts."""
    engine = ScriptedEngine(say(*words))
    engine.tokenizer = ToyTokenizer(adds_bos=True, marks=MARKS)
    return engine


async def complete(engine: ScriptedEngine, **fields: Any) -> Call:
    return await send(scripted_app(engine), request("POST", "/v1/completions", fields))


@pytest.mark.parametrize("prompt", ["a = ", "", None])
async def test_completions_write_what_goes_before_a_suffix(prompt: str | None) -> None:
    engine = filling_engine("1", " + ", "2")
    call = await complete(engine, prompt=prompt, suffix=" + 3\n", logprobs=0, echo=False)
    [choice], [asked] = call.json()["choices"], engine.requests
    shown = engine.tokenizer.decode(asked.prompt_ids, skip_special_tokens=False)
    assert shown == f"<s><|fim_prefix|>{prompt or ''}<|fim_suffix|> + 3\n<|fim_middle|>"
    assert choice["text"] == "1 + 2"
    assert choice["logprobs"]["text_offset"][0] == len(prompt or "")
    assert {engine.tokenizer.token_text(i) for i in asked.stop.stop_token_ids} == {*MARKS}


async def test_several_prompts_have_one_suffix_and_their_own_echoes() -> None:
    engine = filling_engine("x")
    body = (await complete(engine, prompt=["a", "b"], suffix="c", echo=True, stop_token_ids=[7])).json()
    assert [choice["text"] for choice in body["choices"]] == ["ax", "bx"]
    assert 7 in engine.requests[0].stop.stop_token_ids


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [97]}, "prompt"),
        ({"prompt": [[97], [98]]}, "prompt[0]"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ],
)
async def test_what_has_no_meaning_beside_a_suffix_is_refused(fields: dict[str, Any], param: str) -> None:
    engine = filling_engine("x")
    call = await complete(engine, **{"prompt": "a", "suffix": "b", **fields})
    assert (call.status, call.json()["error"]["param"]) == (400, param)
    assert engine.channels == []


async def test_ollamas_client_gets_what_goes_before_a_suffix() -> None:
    engine = filling_engine("1")
    async with serving(app_of(engine, chat_template=CHATML)) as url, ollama.AsyncClient(url) as client:
        shown = await client.show("m")
        made = await client.generate("m", "a = ", suffix="\n")
    [asked] = engine.requests
    prompt = engine.tokenizer.decode(asked.prompt_ids, skip_special_tokens=False)
    assert prompt == "<s><|fim_prefix|>a = <|fim_suffix|>\n<|fim_middle|>"
    assert made.response == "1"
    assert len(asked.stop.stop_token_ids) == 3
    assert shown.capabilities is not None and "insert" in shown.capabilities
