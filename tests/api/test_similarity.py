"""TEI's `POST /similarity` over sockets: the cosines of sentences, and what cannot be compared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import pytest_asyncio

from tests.api.test_embeddings import TEXTS, Embedder
from tests.support.pooling_server import PooledServer, pooled_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder(tmp_path_factory.mktemp("similarity"), "lasttoken", prompts={"query": "find-"})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(embedder: Embedder) -> AsyncIterator[PooledServer]:
    async with pooled_server(embedder.directory) as found:
        yield found


async def test_huggingface_hub_compares_sentences(embedder: Embedder, server: PooledServer) -> None:
    client = huggingface_hub.InferenceClient(model=server.url + "/similarity")
    found = await asyncio.to_thread(client.sentence_similarity, TEXTS[0], other_sentences=TEXTS[1:])
    first, *others = map(embedder.expected, TEXTS)
    np.testing.assert_allclose(found, [first @ other for other in others], atol=1e-4)
    inputs = {"source_sentence": "one", "sentences": ["two"]}
    [asked] = (await server.post("/similarity", inputs=inputs, parameters={"prompt_name": "query"})).json()
    expected = embedder.expected("find-one") @ embedder.expected("find-two")
    assert asked == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "parameters", "status", "where"),
    [
        ({"source_sentence": "a", "sentences": []}, None, 422, "inputs.sentences"),
        ({"source_sentence": "", "sentences": ["a"]}, None, 422, "inputs.source_sentence"),
        ({"source_sentence": "a", "sentences": ["a", ""]}, None, 422, "inputs.sentences[1]"),
        ({"sentences": ["a"]}, None, 422, "inputs.source_sentence"),
        ({"source_sentence": "a", "sentences": ["b", "y" * 600]}, None, 413, "inputs.sentences[1]"),
        ({"source_sentence": "a", "sentences": ["b", "y" * 600]}, {"truncate": True}, 200, ""),
        ({"source_sentence": "a", "sentences": ["b"] * 2049}, None, 413, "inputs.sentences"),
        ({"source_sentence": "a", "sentences": ["b"]}, {"prompt_name": "c"}, 422, "parameters.prompt_name"),
    ],
)
async def test_what_cannot_be_compared_is_named(
    server: PooledServer, inputs: Any, parameters: Any, status: int, where: str
) -> None:
    answer = await server.post("/similarity", inputs=inputs, parameters=parameters)
    assert answer.status_code == status, answer.text
    assert status == 200 or f"`{where}`" in answer.json()["error"], answer.text
