"""The property tests of the wire, for long: random JSON to every route, and all that OpenAPI allows."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api import test_fuzz as openai
from tests.api import test_tgi_fuzz as native
from tests.server.test_tgi_clients import require_client, serve

pytestmark = pytest.mark.soak
LONG = settings(max_examples=4_000, deadline=None, suppress_health_check=list(HealthCheck))
NATIVE_ROUTES = (
    "/",
    "/generate",
    "/generate_stream",
    "/invocations",
    "/tokenize",
    "/chat_tokenize",
    "/detokenize",
)


@LONG
@given(openai.APPS, openai.CHATS)
def test_chats(app_settings: Any, body: Any) -> None:
    asyncio.run(openai.survive(app_settings, "/v1/chat/completions", body))


@LONG
@given(openai.APPS, openai.COMPLETIONS)
def test_completions(app_settings: Any, body: Any) -> None:
    asyncio.run(openai.survive(app_settings, "/v1/completions", body))


@LONG
@given(st.sampled_from(NATIVE_ROUTES), native.ANY_KIND)
def test_native_routes(path: str, body: Any) -> None:
    asyncio.run(native.survive(path, body))


@LONG
@given(st.fixed_dictionaries({"instances": st.lists(native.ANY_KIND, max_size=3)}))
def test_vertex(body: Any) -> None:
    asyncio.run(native.survive("/vertex", body))


@LONG
@given(
    st.sampled_from((*NATIVE_ROUTES, "/vertex", "/v1/chat/completions", "/v1/completions", "/v1/responses")),
    st.binary(max_size=200),
)
def test_bytes(path: str, body: bytes) -> None:
    asyncio.run(native.survive(path, body))


def test_what_the_openapi_document_allows() -> None:
    command = [
        "run", "--max-examples", "500", "--no-color", "--request-timeout", "20", "--workers", "2",
        "--checks", "not_a_server_error,content_type_conformance,response_schema_conformance",
    ]  # fmt: skip
    with serve() as server:
        run = subprocess.run(
            [require_client("st"), *command, server.url + "/api-doc/openapi.json"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stdout[-5000:]
