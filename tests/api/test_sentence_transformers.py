"""Files of sentence-transformers over sockets: vectors, scores and lengths as that library has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.pooling_models import (
    QUERIES,
    RECORDED,
    TEXTS,
    save_embedder,
    save_recorded,
    save_recorded_classifier,
)
from tests.support.pooling_server import pooled_server

ORACLE = Path(__file__).parents[1] / "models/oracle/sentence-transformers.json"


@pytest.mark.parametrize("name", RECORDED)
async def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, name: str) -> None:
    save_recorded(name, tmp_path)
    recorded = json.loads(ORACLE.read_text())[name]
    async with pooled_server(tmp_path) as server:
        answer = await server.post("/v1/embeddings", input=list(TEXTS))
    for entry, vector in zip(answer.json()["data"], recorded, strict=True):
        np.testing.assert_allclose(entry["embedding"], vector, atol=2e-4)


async def test_scores_are_those_of_its_cross_encoder(tmp_path: Path) -> None:
    save_recorded_classifier(tmp_path)
    recorded = json.loads(ORACLE.read_text())["classifier"]
    async with pooled_server(tmp_path) as server:
        for query, scores in zip(QUERIES, recorded, strict=True):
            answer = await server.post("/score", text_1=query, text_2=list(TEXTS))
            found = [entry["score"] for entry in answer.json()["data"]]
            np.testing.assert_allclose(found, scores, atol=1e-4)


@pytest.mark.parametrize("key", ["max_seq_length", "model_max_length"])  # of sentence-transformers 5, and 6
async def test_a_model_s_own_length_bounds_its_texts(tmp_path: Path, key: str) -> None:
    save_embedder(tmp_path, max_length=20 if key == "max_seq_length" else None)
    if key == "model_max_length":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 20}))
    async with pooled_server(tmp_path) as server:
        assert (await server.post("/v1/embeddings", input="y" * 19)).status_code == 200
        assert (await server.post("/v1/embeddings", input="y" * 20)).status_code == 400
