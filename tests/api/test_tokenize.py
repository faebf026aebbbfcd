"""Tokens of texts and chats, in the format that the body's key selects."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, ScriptedEngine, scripted_app
from tests.support.toy_tokenizer import BOS, IM_END, IM_START, ToyTokenizer


async def post(
    path: str, body: Any, *, adds_bos: bool = False, chat_template: str | None = CHATML
) -> httpx.Response:
    engine = ScriptedEngine()
    engine.tokenizer = ToyTokenizer(adds_bos=adds_bos)
    async with client_of(scripted_app(engine, chat_template=chat_template)) as client:
        return await client.post(path, json=body)


MESSAGES = [{"role": "user", "content": "hé"}]
TEMPLATED = "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"


async def test_inputs_give_tgis_array_with_byte_offsets() -> None:
    response = await post("/tokenize", {"inputs": "a é"})
    assert response.status_code == 200
    assert response.json()[:2] == [
        {"id": 97, "text": "a", "start": 0, "stop": 1},
        {"id": 32, "text": " ", "start": 1, "stop": 2},
    ]
    # The toy tokenizer's tokens are bytes: each half of é has its own offsets into the UTF-8 text.
    assert [(token["start"], token["stop"]) for token in response.json()[2:]] == [(2, 3), (3, 4)]


async def test_added_special_tokens_have_no_text() -> None:
    response = await post("/tokenize", {"inputs": "a"}, adds_bos=True)
    assert response.json()[0] == {"id": BOS, "text": "", "start": 0, "stop": 0}


async def test_empty_inputs_are_no_error() -> None:
    assert (await post("/tokenize", {"inputs": ""})).json() == []


async def test_prompt_gives_ids_and_their_count() -> None:
    response = await post("/tokenize", {"prompt": "ab"}, adds_bos=True)
    expected = {"tokens": [BOS, 97, 98], "count": 3, "max_model_len": 512, "token_strs": None}
    assert response.json() == expected
    response = await post("/tokenize", {"prompt": "ab", "add_special_tokens": False}, adds_bos=True)
    assert response.json()["tokens"] == [97, 98]


async def test_messages_are_templated_first() -> None:
    response = await post("/tokenize", {"messages": MESSAGES}, adds_bos=True)
    tokens = response.json()["tokens"]
    assert tokens[0] == IM_START
    assert tokens.count(IM_END) == 1
    assert response.json()["count"] == len(tokens)
    without = await post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})
    assert without.json()["count"] < len(tokens)


@pytest.mark.parametrize("body", [{"prompt": "ab"}, {"messages": MESSAGES}], ids=str)
async def test_tokens_come_as_the_vocabulary_writes_them_on_request(body: dict[str, Any]) -> None:
    answer = (await post("/tokenize", {**body, "return_token_strs": True})).json()
    tokenizer = ToyTokenizer()
    assert answer["token_strs"] == [tokenizer.piece(token_id) for token_id in answer["tokens"]]
    assert (await post("/tokenize", body)).json()["token_strs"] is None


@pytest.mark.parametrize(
    ("body", "is_openai"),
    [
        ({}, False), ({"inputs": 3}, False), ({"inputs": None}, False), ({"prompt": 3}, True),
        ({"prompt": None}, True), ({"messages": "x"}, True),
    ],
    ids=str,
)  # fmt: skip
async def test_refusals_speak_the_dialect_of_the_key(body: Any, is_openai: bool) -> None:
    response = await post("/tokenize", body)
    assert response.status_code == (400 if is_openai else 422)
    assert isinstance(response.json()["error"], dict if is_openai else str)


async def test_detokenize_is_the_inverse_of_tokenize() -> None:
    ids = (await post("/tokenize", {"prompt": "naïve 🦙"})).json()["tokens"]
    assert (await post("/detokenize", {"tokens": ids})).json() == {"prompt": "naïve 🦙"}
    assert (await post("/detokenize", {"tokens": [IM_START, 97]})).json() == {"prompt": "<|im_start|>a"}


@pytest.mark.parametrize("token_id", [-1, 1024, 2**70])
async def test_detokenize_refuses_what_is_no_token(token_id: int) -> None:
    response = await post("/detokenize", {"tokens": [0, token_id]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens[1]"


async def test_chat_tokenize_shows_the_templated_text_and_adds_no_tokens() -> None:
    response = await post("/chat_tokenize", {"messages": MESSAGES}, adds_bos=True)
    body = response.json()
    assert list(body) == ["tokenize_response", "templated_text"]
    assert body["templated_text"] == TEMPLATED
    assert body["tokenize_response"][0] == {"id": IM_START, "text": "<|im_start|>", "start": 0, "stop": 12}
    assert body["tokenize_response"][-1]["stop"] == len(TEMPLATED.encode())


async def test_chat_tokenize_without_a_template_is_tgis_template_error() -> None:
    response = await post("/chat_tokenize", {"messages": MESSAGES}, chat_template=None)
    assert response.status_code == 422
    assert response.json()["error_type"] == "template_error"
    assert response.json()["error"].startswith("Template error: ")


async def test_tokenizer_info_has_what_lm_eval_reads() -> None:
    async with client_of(scripted_app(ScriptedEngine())) as client:
        info = (await client.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
    assert info["chat_template"] == CHATML


async def test_a_tool_without_a_function_is_the_clients_error() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}
    async with client_of(scripted_app(ScriptedEngine())) as client:
        for path in ("/tokenize", "/chat_tokenize"):
            response = await client.post(path, json=body)
            assert response.status_code in (400, 422)
            assert "tools[0].function" in response.text
