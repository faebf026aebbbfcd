"""Libraries through which many programs use OpenAI's API, unmodified, over a real socket."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_tgi_clients import TEXT, require_client, serve

pytestmark = pytest.mark.thorough  # the libraries take ten seconds to import

SCRIPT = Path(__file__).parent / "tgi_clients" / "openai_users.py"
USAGE = {"input_tokens": 22, "output_tokens": 3, "total_tokens": 25}  # of "Hi!" in the toy model's template


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    with serve() as server:
        run = subprocess.run(
            [require_client("python"), SCRIPT, server.url + "/v1"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    yield json.loads(run.stdout.splitlines()[-1])


def test_langchain_reads_answers_and_streams(found: dict[str, Any]) -> None:
    chat = found["langchain"]
    assert chat["text"] == chat["streamed"] == chat["async"] == TEXT
    assert chat["finish"] == chat["streamed_finish"] == "stop"  # langchain joins two chunks' values
    assert chat["completion"] == chat["completion_streamed"] == TEXT
    assert chat["logprobs"] == 2
    assert chat["fingerprint"] == "fp_toy"


def test_langchain_counts_the_tokens_once(found: dict[str, Any]) -> None:
    streamed = found["langchain"]["streamed_usage"]
    assert {name: streamed[name] for name in USAGE} == USAGE
    assert found["langchain"]["usage"]["output_tokens"] == 3


def test_langchain_knows_a_prompt_that_is_too_long(found: dict[str, Any]) -> None:
    *kinds, message = found["langchain"]["too long"]
    assert "BadRequestError" in kinds
    assert "ContextOverflowError" in kinds
    assert "context_length_exceeded" in message


def test_litellm_reads_answers_and_streams(found: dict[str, Any]) -> None:
    lite = found["litellm"]
    assert lite["text"] == lite["streamed"] == lite["completion"] == TEXT
    assert (lite["finish"], lite["streamed_finish"]) == ("stop", ["stop"])
    assert lite["usage"] == lite["streamed_usage"] == 3


def test_litellm_raises_its_own_exceptions(found: dict[str, Any]) -> None:
    assert found["litellm"]["too long"][0] == "ContextWindowExceededError"
    assert found["litellm"]["bad"][0] == "BadRequestError"
