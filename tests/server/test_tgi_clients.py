"""TGI's clients, unmodified, over a real socket: their results and exceptions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.support.live_server import LiveServer
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app
from tgi_asgi.settings import Settings

SCRIPT = Path(__file__).parent / "tgi_clients" / "examples.py"
# `make test` creates it separately, because these packages conflict with those of the tests.
CLIENTS = Path(sys.prefix) / "clients" / "bin"
TEXT = "Hello wörld"


def require_client(name: str) -> Path:
    """Return a program of the clients' environment; skip the test if it is missing."""
    path = CLIENTS / name
    if not path.exists():
        pytest.skip("TGI's clients are not installed: `make test` does it")
    return path


def serve(**settings: Any) -> LiveServer:
    engine_script = say("Hello", " wörld")
    return LiveServer(lambda: scripted_app(ScriptedEngine(engine_script), Settings(**settings)))


def run_examples(url: str, *flags: str) -> dict[str, Any]:
    """Run the calls in the clients' own environment; return the JSON that they print."""
    run = subprocess.run(
        [require_client("python"), SCRIPT, url, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    with serve(tgi_compat=True) as server:
        yield run_examples(server.url, "--tgi-compat")


def test_the_text_generation_client_reads_every_part_of_an_answer(found: dict[str, Any]) -> None:
    native = found["native"]
    assert native["text"] == native["streamed"] == native["streamed_text"] == TEXT
    assert native["finish"] == "eos_token"
    assert native["tokens"] == ["Hello", " wörld", "</s>"]
    assert (native["others"], native["top"], native["streamed_seed"]) == (1, 2, 7)
    assert native["full"] == "Hi" + TEXT


def test_the_text_generation_client_with_asyncio(found: dict[str, Any]) -> None:
    assert found["async"] == {"text": TEXT, "streamed": TEXT + "</s>"}


def test_the_text_generation_clients_chat_under_tgi_compat(found: dict[str, Any]) -> None:
    assert found["chat"] == {"text": TEXT, "streamed": TEXT, "role": "assistant"}


def test_refusals_become_the_clients_exceptions(found: dict[str, Any]) -> None:
    assert all(
        text.startswith("ValidationError: Input validation error: ") for text in found["errors"].values()
    )


def test_huggingface_hub_of_tgis_days(found: dict[str, Any]) -> None:
    hub = found["hub"]
    # The client posts to `/`, whose default is the full text; its streams join the tokens' texts.
    assert hub["text"] == hub["details_text"] == hub["last_text"] == "Hi" + TEXT
    assert hub["streamed"] == TEXT
    assert (hub["details_finish"], hub["tokens"]) == ("eos_token", 3)
    assert hub["chat"] == hub["chat_streamed"] == TEXT
    assert (hub["chat_finish"], hub["chat_usage"]) == ("stop", 3)
    assert (hub["endpoint"], hub["healthy"]) == ("toy/model", True)


def test_the_same_clients_without_tgi_compat() -> None:
    with serve() as server:
        found = run_examples(server.url)
    assert found["native"]["text"] == TEXT
    assert found["hub"]["chat"] == found["hub"]["chat_streamed"] == TEXT


MESSAGES = [{"role": "user", "content": "Hi!"}]


def test_todays_huggingface_hub() -> None:
    with serve(api_key=("hf_key",)) as server:
        client = InferenceClient(server.url, token="hf_key")
        details = client.text_generation("Hi", max_new_tokens=8, details=True, return_full_text=False)
        assert details.generated_text == TEXT
        assert details.details is not None and details.details.finish_reason == "eos_token"
        events = list(client.text_generation("Hi", max_new_tokens=8, stream=True, details=True))
        assert "".join(event.token.text for event in events if not event.token.special) == TEXT
        answer = client.chat_completion(MESSAGES, max_tokens=8)
        assert answer.choices[0].message.content == TEXT
        chunks = client.chat_completion(MESSAGES, max_tokens=8, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT


def test_huggingface_hub_shows_a_refused_chats_reason() -> None:
    with serve() as server:
        client = InferenceClient(server.url)
        for stream in (False, True):
            with pytest.raises(HfHubHTTPError, match="\n\nInput validation error: `top_p` must be in"):
                client.chat_completion(MESSAGES, top_p=7.0, stream=stream)


async def test_todays_huggingface_hub_with_asyncio() -> None:
    with serve() as server:
        async with AsyncInferenceClient(server.url) as client:
            assert await client.text_generation("Hi", return_full_text=False) == TEXT
            stream = await client.chat_completion(MESSAGES, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(texts) == TEXT


def test_answers_to_what_the_openapi_document_allows_are_as_it_says() -> None:
    command = [
        "run", "--phases", "fuzzing", "--max-examples", "4", "--no-color", "--request-timeout", "20",
        "--checks", "not_a_server_error,content_type_conformance,response_schema_conformance",
    ]  # fmt: skip
    with serve() as server:
        run = subprocess.run(
            [require_client("st"), *command, server.url + "/api-doc/openapi.json"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert run.returncode == 0, run.stdout[-5000:]
