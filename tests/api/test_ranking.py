"""Rankings and scores over sockets: classifiers and yes-or-no models, against `transformers`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.support.pooling_models import edit, save_classifier, save_embedder
from tests.support.pooling_server import PooledServer, pooled_server
from tests.support.ranking import CARD, INSTRUCTION
from tgi_asgi.text.tokenizer import Tokenizer

QUERY, DOCUMENTS = "what-is-it", ["a-thing", "no-idea", "it-is-what-it-is" * 3]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[str, str], float]]:
    directory = tmp_path_factory.mktemp("classifier")
    model = save_classifier(directory, 1)
    tokenizer = Tokenizer.from_directory(directory)

    def expected(query: str, document: str) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer.encode_pair(query, document)[0]])).logits[0]
        return float(logits[0])

    return directory, expected


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(classifier: tuple[Path, Any]) -> AsyncIterator[PooledServer]:
    async with pooled_server(classifier[0]) as found:
        yield found


def sigmoid(logit: float) -> float:
    return float(torch.sigmoid(torch.tensor(logit, dtype=torch.float64)))


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_documents_come_back_best_first(
    classifier: tuple[Path, Callable[[str, str], float]], server: PooledServer, path: str
) -> None:
    answer = (await server.post(path, model="tiny", query=QUERY, documents=DOCUMENTS)).json()
    scores = [sigmoid(classifier[1](QUERY, document)) for document in DOCUMENTS]
    order = sorted(range(3), key=lambda index: -scores[index])
    assert [result["index"] for result in answer["results"]] == order
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(scores[result["index"]], abs=1e-4)
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0
    assert answer["model"] == "tiny"
    assert answer["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1},
    }  # Cohere's


async def test_what_a_ranking_shows_is_asked_for(server: PooledServer) -> None:
    body = {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS]}
    answer = (await server.post("/rerank", **body, top_n=2, return_documents=False)).json()
    assert len(answer["results"]) == 2
    assert all(list(result) == ["index", "relevance_score"] for result in answer["results"])
    assert len((await server.post("/rerank", **body, top_n=0)).json()["results"]) == 3


async def test_tei_s_ranking_is_told_by_its_texts(
    classifier: tuple[Path, Callable[[str, str], float]], server: PooledServer
) -> None:
    body: dict[str, Any] = {"query": QUERY, "texts": DOCUMENTS}
    logits = [classifier[1](QUERY, document) for document in DOCUMENTS]
    plain = (await server.post("/rerank", **body)).json()
    raw = (await server.post("/rerank", **body, raw_scores=True, return_text=True)).json()
    for one, other in zip(plain, raw, strict=True):
        assert list(one) == ["index", "score"]
        assert one["index"] == other["index"]
        assert other["text"] == DOCUMENTS[one["index"]]
        assert other["score"] == pytest.approx(logits[one["index"]], abs=1e-3)
        assert one["score"] == pytest.approx(sigmoid(logits[one["index"]]), abs=1e-4)


async def test_scores_without_activation_are_logits(
    classifier: tuple[Path, Callable[[str, str], float]], server: PooledServer
) -> None:
    expected = [classifier[1](QUERY, document) for document in DOCUMENTS]
    scores = await server.post("/score", text_1=QUERY, text_2=DOCUMENTS, use_activation=False)
    assert [entry["score"] for entry in scores.json()["data"]] == pytest.approx(expected, abs=1e-3)
    ranking = await server.post("/rerank", query=QUERY, documents=DOCUMENTS, use_activation=False)
    for result in ranking.json()["results"]:
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-3)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_pairs_are_scored_one_by_one_or_one_against_all(
    classifier: tuple[Path, Callable[[str, str], float]], server: PooledServer, path: str
) -> None:
    expected = classifier[1]
    for first, second in (("a", "b"), ("a", ["b", "c"]), (["a", "d"], ["b", "c"])):
        answer = (await server.post(path, text_1=first, text_2=second)).json()
        firsts = [first] * len(second) if isinstance(first, str) else first
        scores = [sigmoid(expected(a, b)) for a, b in zip(firsts, second, strict=True)]
        assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
        assert answer["object"] == "list" and answer["usage"]["total_tokens"] > 0
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(scores, abs=1e-4)
        assert [(entry["index"], entry["object"]) for entry in answer["data"]] == [
            (index, "score") for index in range(len(scores))
        ]


@pytest.mark.parametrize("names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2")])
async def test_vllms_newer_names_for_both_texts(server: PooledServer, names: tuple[str, str]) -> None:
    expected = (await server.post("/score", text_1=QUERY, text_2=DOCUMENTS)).json()["data"]
    answer = await server.post("/score", **dict(zip(names, (QUERY, DOCUMENTS), strict=True)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == expected


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/rerank", {"query": "a"}, 400, "documents"),
        ("/rerank", {"query": "a", "documents": []}, 400, "documents"),
        ("/rerank", {"query": "", "documents": ["b"]}, 400, "query"),
        ("/rerank", {"query": "a", "documents": ["b", ""]}, 400, "documents[1]"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"] * 2049}, 400, "documents"),
        ("/rerank", {"query": "a", "documents": ["b" * 600]}, 400, "documents[0]"),
        ("/rerank", {"query": "a", "documents": [{"image": "b"}]}, 400, "documents[0].text"),
        ("/rerank", {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 0}, 400, None),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 400, "text_1"),
        ("/score", {"text_1": "a", "text_2": []}, 400, "text_2"),
        ("/score", {"text_1": "a"}, 400, "text_2"),
        ("/score", {}, 400, "text_1"),
        ("/score", {"items": ["a"]}, 400, "queries"),
        ("/score", {"text_1": "a", "text_2": "b", "model": "m" * 257}, 400, "model"),
        ("/score", {"queries": "a", "documents": ["b", ""]}, 400, "documents[1]"),
        ("/score", {"queries": ["a", "b"], "items": ["c"]}, 400, "queries"),
        ("/v1/embeddings", {"input": "a"}, 400, "model"),
        ("/rerank", {"query": "a", "texts": []}, 422, None),
        ("/rerank", {"query": "a", "texts": ["b" * 600]}, 413, None),
        ("/rerank", {"query": 1, "texts": ["b"]}, 422, None),
    ],
)
async def test_what_is_wrong_is_named(
    server: PooledServer, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await server.post(path, **body)
    assert answer.status_code == status, answer.text
    if "texts" in body:
        assert list(answer.json()) == ["error", "error_type"]
    elif param is not None:
        assert answer.json()["error"]["param"] == param


async def test_of_a_long_document_the_beginning_counts(
    classifier: tuple[Path, Callable[[str, str], float]], server: PooledServer
) -> None:
    document = "b" * 900
    room = 512 - 2  # the query has one token, and one token follows the pair
    expected = sigmoid(classifier[1]("a", "b" * room))
    answer = await server.post("/score", text_1="a", text_2=document, truncate_prompt_tokens=-1)
    assert answer.json()["data"][0]["score"] == pytest.approx(expected, abs=1e-4)
    answer = await server.post("/rerank", query="a", texts=[document], truncate=True)
    assert answer.json()[0]["score"] == pytest.approx(expected, abs=1e-4)
    expected = sigmoid(classifier[1]("a", "c" * 9 + "b" * (room - 9)))
    text = "b" * 500 + "c" * 9 + "b" * (room - 9)
    body = {"query": "a", "texts": [text], "truncate": True, "truncation_direction": "Left"}
    answer = await server.post("/rerank", **body)
    assert answer.json()[0]["score"] == pytest.approx(expected, abs=1e-4)


async def test_a_query_that_leaves_no_room_is_what_is_too_long(server: PooledServer) -> None:
    answer = await server.post("/rerank", query="a" * 600, texts=["b"], truncate=True)
    assert answer.status_code == 413
    assert "At most 512 tokens are kept" in answer.json()["error"]
    answer = await server.post("/rerank", query="abc", documents=["b"], truncate_prompt_tokens=2)
    assert answer.status_code == 400
    assert "At most 2 tokens are kept of `documents[0]` with its query" in answer.json()["error"]["message"]
    assert "shorten the query" in answer.json()["error"]["message"]
    answer = await server.post("/rerank", query="abc", documents=["b" * 509])
    assert "`documents[0]` has 513 with its query" in answer.json()["error"]["message"]


async def test_two_labels_are_weighed_against_each_other(tmp_path: Path) -> None:
    model = save_classifier(tmp_path, 2)
    ids = Tokenizer.from_directory(tmp_path).encode_pair("a", "b")[0]
    with torch.inference_mode():
        expected = float(torch.softmax(model(torch.tensor([ids])).logits[0], 0)[1])
    async with pooled_server(tmp_path) as server:
        answer = (await server.post("/score", text_1="a", text_2="b")).json()
    assert answer["data"][0]["score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("by", ["setting", "modules"])
async def test_yes_is_weighed_against_no_behind_the_model_cards_prompt(tmp_path: Path, by: str) -> None:
    model = save_embedder(tmp_path, None, is_bare=False)
    tokenizer = Tokenizer.from_directory(tmp_path)
    settings: dict[str, Any] = {"score_tokens": "n,y"}
    if by == "modules":
        [no], [yes] = (tokenizer.encode(word, add_special_tokens=False) for word in "ny")
        modules = [
            {"idx": 0, "path": "", "type": "a.Transformer"},
            {"idx": 1, "path": "1_L", "type": "a.LogitScore"},
        ]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "1_L").mkdir()
        (tmp_path / "1_L/config.json").write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
        settings = {}

    def expected(document: str, instruction: str = INSTRUCTION) -> float:
        text = CARD.format(instruction=instruction, query=QUERY, document=document)
        ids = tokenizer.encode(text, add_special_tokens=False)
        [no], [yes] = (tokenizer.encode(word, add_special_tokens=False) for word in "ny")
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        return float(torch.softmax(logits[[no, yes]], 0)[1])

    async with pooled_server(tmp_path, **settings) as server:
        answer = (await server.post("/rerank", query=QUERY, documents=DOCUMENTS)).json()
        for result in answer["results"]:
            score = expected(DOCUMENTS[result["index"]])
            assert result["relevance_score"] == pytest.approx(score, abs=1e-4)
        answer = (await server.post("/score", text_1=QUERY, text_2="b", instruction="Find")).json()
        assert answer["data"][0]["score"] == pytest.approx(expected("b", "Find"), abs=1e-4)
        cut = await server.post("/score", text_1=QUERY, text_2="b" * 900, truncate_prompt_tokens=-1)
        assert cut.status_code == 200
        assert cut.json()["usage"]["prompt_tokens"] == 512
        # Each of these characters has two tokens, and a cut never leaves half of one.
        text = CARD.format(instruction=INSTRUCTION, query=QUERY, document="")
        room = 512 - len(tokenizer.encode(text, add_special_tokens=False))
        for more in range(2):
            body = {"text_1": QUERY + "a" * more, "text_2": "\u00a3" * 900}
            cut = await server.post("/score", **body, truncate_prompt_tokens=-1)
            assert cut.json()["usage"]["prompt_tokens"] == 512 - (room - more) % 2


async def test_a_model_s_own_template_makes_the_prompt(tmp_path: Path) -> None:
    model = save_classifier(tmp_path, 1)
    template = (
        "{%- for m in messages if m.role == 'query' -%}Q{{ m.content }}{%- endfor -%}"
        "{%- for m in messages if m.role == 'document' -%}D{{ m.content }}{%- endfor -%}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    ids = Tokenizer.from_directory(tmp_path).encode("QaDb", add_special_tokens=False)
    with torch.inference_mode():
        expected = sigmoid(float(model(torch.tensor([ids])).logits[0, 0]))
    async with pooled_server(tmp_path) as server:
        answer = (await server.post("/score", text_1="a", text_2="b")).json()
    assert answer["data"][0]["score"] == pytest.approx(expected, abs=1e-4)


async def test_more_than_two_labels_are_no_score(tmp_path: Path) -> None:
    save_classifier(tmp_path, 3)
    async with pooled_server(tmp_path) as server:
        answer = await server.post("/score", text_1="a", text_2="b")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_supported")
        assert "3 labels" in answer.json()["error"]["message"]


async def test_a_classifier_may_embed_if_the_administrator_says_how(tmp_path: Path) -> None:
    save_classifier(tmp_path, 1)
    edit(tmp_path / "config.json", num_labels=1)
    async with pooled_server(tmp_path, pooling="mean") as server:
        answer = (await server.post("/v1/embeddings", input="a")).json()
        assert len(answer["data"][0]["embedding"]) == 64


async def test_a_long_query_times_many_documents_is_bounded(
    server: PooledServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.api.pooled.MAX_TOKENS", 1000)
    answer = await server.post("/rerank", query="q" * 300, documents=["b"] * 10)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "documents")
    answer = await server.post(
        "/rerank", query="q" * 100_000, documents=["b"] * 10, truncate_prompt_tokens=-1
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "documents[0]")
