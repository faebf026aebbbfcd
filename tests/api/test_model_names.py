"""The name of a model that a request gives: shown, refused when names are strict, logged once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.test_openai_chat import HI, chat
from tests.support.asgi import request, send
from tests.support.scripted_engine import ScriptedEngine, scripted_app
from tgi_asgi.settings import Settings


async def test_names_of_models() -> None:
    for given, shown in (("tgi", "toy/model"), (None, "toy/model"), ("gpt-4o", "gpt-4o"), ("", "")):
        assert (await chat(model=given)).json()["model"] == shown
    strict = {"settings": Settings(strict_model_names=True)}
    # Without a name, huggingface_hub's clients send "dummy", and huggingface.js the endpoint's address.
    for name in ("tgi", "dummy", "http://127.0.0.1:3000", "https://a.example/v1", "toy/model", None):
        assert (await chat(app=strict, model=name)).json()["model"] == "toy/model"
    call = await chat(app=strict, model="gpt-4o")
    assert call.status == 404
    assert call.json()["error"] == {
        "message": "The model 'gpt-4o' does not exist.", "type": "invalid_request_error",
        "param": "model", "code": "model_not_found",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses/input_tokens", {"input": "hi"}),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [97]}),
    ],
)
async def test_names_are_strict_where_tokens_are_counted(path: str, body: dict[str, Any]) -> None:
    app = scripted_app(ScriptedEngine(), settings=Settings(strict_model_names=True))
    for name, status in (("gpt-4o", 404), ("toy/model", 200), ("dummy", 200)):
        call = await send(app, request("POST", path, {**body, "model": name}))
        assert call.status == status, call.json()


async def test_an_unknown_model_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    app = scripted_app(ScriptedEngine())
    with caplog.at_level("INFO"):
        for _ in range(3):
            await send(app, request("POST", "/v1/chat/completions", {"messages": HI, "model": "gpt-4o"}))
    assert sum("'gpt-4o'" in record.message for record in caplog.records) == 1
