"""Encoders over sockets, against transformers and sentence-transformers: vectors, scores, errors, bursts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from tests.support.encoders import RECORDED, TEXTS, logits_of, save_encoder, save_recorded, states_of
from tests.support.pooling_models import QUERIES, pooled
from tests.support.pooling_server import pooled_server
from tgi_asgi.api.pool_call import MAX_INPUTS
from tgi_asgi.text.tokenizer import Tokenizer

ORACLE = Path(__file__).parents[1] / "models/oracle/sentence-transformers-encoders.json"
BURST = ["a", "of three words", "letter " * 12, "x" * 90, "some-dashes"]


@pytest.mark.parametrize("kind", ["Bert", "ModernBert", pytest.param("MPNet", marks=pytest.mark.models)])
async def test_openais_sdk_gets_vectors_of_a_burst_as_of_each_alone(tmp_path: Path, kind: str) -> None:
    model = save_encoder(tmp_path, kind)
    tokenizer = Tokenizer.from_directory(tmp_path)
    expected = []
    for text in BURST:
        vector = pooled(states_of(model, tokenizer.encode(text, add_special_tokens=True)), "mean_tokens")
        expected.append(torch.nn.functional.normalize(vector, dim=0))
    async with pooled_server(tmp_path, max_batch_size=8) as server:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0)
        async with client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="tiny", input=BURST * 4) for _ in range(3))
            )
        for answer in answers:
            assert len(answer.data) == 20
            for index, each in enumerate(answer.data):
                np.testing.assert_allclose(each.embedding, expected[index % 5], atol=1e-4)
        tei = (await server.post("/embed", inputs=BURST)).json()
        for found, vector in zip(tei, expected, strict=True):
            np.testing.assert_allclose(found, vector, atol=1e-4)
        stats = server.app.context.ready().engine.describe()
        assert stats["blocks"]["used"] == 0
        assert stats["counters"]["steps"] < 4 * 20  # each step computes several prompts


@pytest.mark.parametrize("num_labels", [1, 2])
async def test_a_cross_encoder_scores_pairs_with_their_segments(tmp_path: Path, num_labels: int) -> None:
    model = save_encoder(tmp_path, "Bert", "ForSequenceClassification", None, num_labels=num_labels)
    tokenizer = Tokenizer.from_directory(tmp_path)
    documents = ["a fit", "another document", "z"]
    wanted: list[float] = []
    unmarked: list[float] = []
    for document in documents:
        ids, second = tokenizer.encode_pair("what", document)
        assert second == 6
        for found, start in ((wanted, second), (unmarked, None)):
            logits = logits_of(model, ids, start)
            found.append(float(logits[0].sigmoid() if num_labels == 1 else logits.softmax(0)[1]))
    assert max(abs(a - b) for a, b in zip(wanted, unmarked, strict=True)) > 0.01
    async with pooled_server(tmp_path) as server:
        ranked = (await server.post("/v1/rerank", query="what", documents=documents)).json()["results"]
        assert [each["index"] for each in ranked] == sorted(range(3), key=lambda at: -wanted[at])
        for each in ranked:
            assert each["relevance_score"] == pytest.approx(wanted[each["index"]], abs=1e-4)
        tei = (await server.post("/rerank", query="what", texts=documents)).json()
        assert {each["index"]: pytest.approx(each["score"], abs=1e-4) for each in tei} == dict(
            enumerate(wanted)
        )
        answer = (await server.post("/score", text_1="what", text_2=documents)).json()
        assert [each["score"] for each in answer["data"]] == pytest.approx(wanted, abs=1e-4)
        cut = await server.post("/score", text_1="what", text_2="y " * 300, truncate_prompt_tokens=-1)
        assert cut.json()["usage"]["prompt_tokens"] == 130
        refused = await server.post("/v1/embeddings", input="a")
        assert refused.json()["error"]["code"] == "model_not_supported"


async def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    save_encoder(tmp_path, "Bert")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"input": "y " * 129}, "input"),
        ({"input": ["a", "y " * 200]}, "input[1]"),
        ({"input": [[5] * 131]}, "input[0]"),
        ({"input": [160]}, "input[0]"),
        ({"input": ""}, "input"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
    ]
    async with pooled_server(tmp_path) as server:
        for body, param in wrong:
            answer = await server.post("/v1/embeddings", **body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param
        fits = await server.post("/v1/embeddings", input="y " * 128)
        assert fits.json()["usage"]["prompt_tokens"] == 130


async def test_an_encoder_does_not_generate(tmp_path: Path) -> None:
    save_encoder(tmp_path, "Bert")
    async with pooled_server(tmp_path) as server:
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            answer = await server.post(path, **body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "model_not_supported"
        info = (await server.http.get("/info")).json()
        assert (info["model_id"], info["model_pipeline_tag"]) == ("tiny", "feature-extraction")
        assert info["max_client_batch_size"] == MAX_INPUTS


async def test_info_says_how_many_inputs_a_call_may_have(tmp_path: Path) -> None:
    save_encoder(tmp_path, "Bert")
    async with pooled_server(tmp_path, max_client_batch_size=300) as server:
        assert (await server.http.get("/info")).json()["max_client_batch_size"] == 300
        answers = [await server.post("/embed", inputs=["a"] * count) for count in (300, 301)]
        assert [answer.status_code for answer in answers] == [200, 413]


@pytest.mark.parametrize("name", [name for name, (_, _, mode) in RECORDED.items() if mode])
async def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, name: str) -> None:
    recorded = json.loads(ORACLE.read_text())[name]
    save_recorded(name, tmp_path)
    async with pooled_server(tmp_path) as server:
        answer = (await server.post("/v1/embeddings", input=list(TEXTS))).json()
    for each, expected in zip(answer["data"], recorded, strict=True):
        np.testing.assert_allclose(each["embedding"], expected, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, (_, _, mode) in RECORDED.items() if not mode])
async def test_scores_are_those_of_sentence_transformers(tmp_path: Path, name: str) -> None:
    recorded = json.loads(ORACLE.read_text())[name]
    save_recorded(name, tmp_path)
    async with pooled_server(tmp_path) as server:
        for query, expected in zip(QUERIES, recorded, strict=True):
            answer = (await server.post("/score", text_1=query, text_2=list(TEXTS))).json()
            assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-4)
