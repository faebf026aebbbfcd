"""Images and embeddings through common SDKs: OpenAI's for Node, langchain, litellm, all unmodified."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from tests.server.conftest import run_node
from tests.server.test_tgi_clients import require_client
from tests.support.pictures import data_url
from tests.support.vision_models import make, picture
from tests.support.vision_runs import served

SCRIPT = Path(__file__).parent / "tgi_clients" / "multimodal.py"
TEXTS = ["one text", "another"]
pytestmark = pytest.mark.asyncio(loop_scope="module")


def url_of_picture() -> str:
    stream = io.BytesIO()
    picture(40, 30).save(stream, "PNG")
    return data_url(stream.getvalue())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Yield the URL of a vision model that also computes embeddings."""
    folder = tmp_path_factory.mktemp("llava")
    make("llava", folder)
    async with served(folder, pooling="last") as (address, _):
        yield f"{address}/v1"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(url: str) -> dict[str, Any]:
    """Return the results of the same calls without an SDK."""
    content = [
        {"type": "text", "text": "What is in"},
        {"type": "image_url", "image_url": {"url": url_of_picture()}},
    ]
    chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        answer = (await http.post("/chat/completions", json=chat)).json()
        vectors = (await http.post("/embeddings", json={"input": TEXTS})).json()
    return {
        "chat": answer["choices"][0]["message"]["content"],
        "tokens": answer["usage"]["prompt_tokens"],
        "vectors": [each["embedding"] for each in vectors["data"]],
    }


def run_clients(url: str) -> Any:
    """Run the calls in the clients' own environment; return the JSON that they print."""
    command = [str(require_client("python")), str(SCRIPT), url, url_of_picture()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def agree(found: Any, wanted: Any) -> None:
    """Compare vectors; SDKs read them from float32 in base64, or from decimals."""
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=0, atol=1e-6)


async def test_openai_node_sends_pictures_and_asks_for_vectors(url: str, expected: dict[str, Any]) -> None:
    found = await asyncio.to_thread(run_node, "multimodal.mjs", url, PICTURE=url_of_picture())
    assert found["chat"] == expected["chat"]
    assert found["tokens"] == expected["tokens"]
    assert found["response"].startswith(expected["chat"])
    agree(found["vectors"], expected["vectors"])
    agree(found["float"], expected["vectors"][0])
    assert found["refusal"] == {"status": 400, "param": "messages[0].content[0].image_url"}


@pytest.mark.thorough
async def test_langchain_and_litellm_send_pictures_and_ask_for_vectors(
    url: str, expected: dict[str, Any]
) -> None:
    found = await asyncio.to_thread(run_clients, url)
    assert found["langchain"]["chat"] == found["litellm"]["chat"] == expected["chat"]
    agree(found["langchain"]["vectors"], expected["vectors"])
    agree(found["langchain"]["query"], expected["vectors"][0])
    agree(found["litellm"]["vectors"], expected["vectors"])
