"""Property tests of the wire formats, for long: random JSON to every route, and all that OpenAPI allows."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.api import test_fuzz as openai
from tests.api import test_tgi_fuzz as native
from tests.server.test_tgi_clients import require_client, serve
from tests.soak.conftest import Report
from tests.soak.lag import reporting_lag
from tests.support.hypothesis_examples import for_all
from tests.support.scale import Scale
from tgi_asgi.settings import Settings

EXAMPLES = (25, 4_000)
NATIVE_ROUTES = (
    "/",
    "/generate",
    "/generate_stream",
    "/invocations",
    "/tokenize",
    "/chat_tokenize",
    "/detokenize",
)
ALL_ROUTES = (*NATIVE_ROUTES, "/vertex", "/v1/chat/completions", "/v1/completions", "/v1/responses")


def test_chats(scale: Scale) -> None:
    @for_all(scale(*EXAMPLES), openai.APPS, openai.CHATS)
    def check(app_settings: Settings, body: Any) -> None:
        asyncio.run(openai.post(app_settings, "/v1/chat/completions", body))


def test_completions(scale: Scale) -> None:
    @for_all(scale(*EXAMPLES), openai.APPS, openai.COMPLETIONS)
    def check(app_settings: Settings, body: Any) -> None:
        asyncio.run(openai.post(app_settings, "/v1/completions", body))


def test_native_routes(scale: Scale) -> None:
    @for_all(scale(*EXAMPLES), st.sampled_from(NATIVE_ROUTES), native.ANY_KIND)
    def check(path: str, body: Any) -> None:
        asyncio.run(native.post(path, body))


def test_vertex(scale: Scale) -> None:
    @for_all(scale(*EXAMPLES), st.lists(native.ANY_KIND, max_size=3))
    def check(instances: list[Any]) -> None:
        asyncio.run(native.post("/vertex", {"instances": instances}))


def test_bytes(scale: Scale) -> None:
    @for_all(scale(*EXAMPLES), st.sampled_from(ALL_ROUTES), st.binary(max_size=200))
    def check(path: str, body: bytes) -> None:
        asyncio.run(native.post(path, body))


@pytest.mark.soak  # a few examples are in tests/server/test_tgi_clients.py
def test_what_the_openapi_document_allows(report: Report) -> None:
    command = [
        "run", "--max-examples", "500", "--no-color", "--request-timeout", "20", "--workers", "2",
        "--checks", "not_a_server_error,content_type_conformance,response_schema_conformance",
    ]  # fmt: skip
    with serve() as server, reporting_lag(server.url, report):
        run = subprocess.run(
            [require_client("st"), *command, server.url + "/api-doc/openapi.json"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stdout[-5000:]
