"""Classification over sockets, by TEI's and vLLM's routes: labels and probabilities against transformers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
import transformers

from tests.support.encoders import logits_of, save_encoder
from tests.support.pooling_models import EOS, edit, save_classifier, save_embedder
from tests.support.pooling_server import PooledServer, pooled_server
from tgi_asgi.text.tokenizer import Tokenizer

LABELS = ["dull", "fine", "great"]
TEXTS = ["a-good-one", "no", "what-is-it-" * 4]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    directory = tmp_path_factory.mktemp("classifier")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: at for at, name in enumerate(LABELS)}}
    return directory, save_encoder(directory, "Bert", "ForSequenceClassification", None, **names)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(classifier: tuple[Path, Any]) -> AsyncIterator[PooledServer]:
    async with pooled_server(classifier[0]) as found:
        yield found


def probabilities(model: Any, directory: Path, text: str, second: str | None = None) -> list[float]:
    """Return what the pipeline of transformers gives each label."""
    tokenizer = Tokenizer.from_directory(directory)
    if second is None:
        logits = logits_of(model, tokenizer.encode(text, add_special_tokens=True))
    else:
        logits = logits_of(model, *tokenizer.encode_pair(text, second))
    problem = model.config.problem_type
    if problem == "regression":
        return [float(each) for each in logits]
    is_sigmoid = problem == "multi_label_classification" or len(logits) == 1
    return [float(each) for each in (logits.sigmoid() if is_sigmoid else logits.softmax(0))]


def check(found: list[dict[str, Any]], expected: list[float], names: list[str]) -> None:
    """Check predictions, which come best first."""
    order = np.argsort([-each for each in expected])
    assert [each["label"] for each in found] == [names[at] for at in order]
    assert [each["score"] for each in found] == pytest.approx([expected[at] for at in order], abs=1e-4)


@pytest.mark.parametrize("path", ["/predict", "/", "/invocations"])
async def test_tei_s_predictions_of_texts_pairs_and_batches(
    classifier: tuple[Path, Any], server: PooledServer, path: str
) -> None:
    directory, model = classifier
    for inputs in (TEXTS[0], [TEXTS[0]]):
        found = (await server.post(path, inputs=inputs)).json()
        check(found, probabilities(model, directory, TEXTS[0]), LABELS)
    found = (await server.post(path, inputs=TEXTS[:2])).json()  # two texts are a pair, as in TEI
    check(found, probabilities(model, directory, *TEXTS[:2]), LABELS)
    batch = [[TEXTS[0]], TEXTS[1:], [TEXTS[2]]]
    answer = (await server.post(path, inputs=batch)).json()
    for found, texts in zip(answer, batch, strict=True):
        check(found, probabilities(model, directory, *texts), LABELS)


async def test_raw_scores_are_logits_and_long_texts_are_cut_on_request(
    classifier: tuple[Path, Any], server: PooledServer
) -> None:
    directory, model = classifier
    ids = Tokenizer.from_directory(directory).encode(TEXTS[0], add_special_tokens=True)
    found = (await server.post("/predict", inputs=TEXTS[0], raw_scores=True)).json()
    check(found, [float(each) for each in logits_of(model, ids)], LABELS)
    assert (await server.post("/predict", inputs="y " * 200)).status_code == 413
    assert (await server.post("/predict", inputs="y " * 200, truncate=True)).status_code == 200
    pair = await server.post("/predict", inputs=["what", "y " * 200], truncate=True)
    assert len(pair.json()) == 3


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
async def test_vllm_s_classes_have_their_probabilities_in_order(
    classifier: tuple[Path, Any], server: PooledServer, path: str
) -> None:
    directory, model = classifier
    answer = (await server.post(path, model="tiny", input=TEXTS)).json()
    assert answer["id"].startswith("classify-") and answer["object"] == "list" and answer["model"] == "tiny"
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    for index, (found, text) in enumerate(zip(answer["data"], TEXTS, strict=True)):
        expected = probabilities(model, directory, text)
        assert found["probs"] == pytest.approx(expected, abs=1e-4)
        assert (found["index"], found["num_classes"]) == (index, 3)
        assert found["label"] == LABELS[int(np.argmax(expected))]
    plain, bare = [
        (await server.post(path, input=TEXTS[0], add_special_tokens=adds)).json() for adds in (True, False)
    ]
    assert plain["usage"]["prompt_tokens"] > bare["usage"]["prompt_tokens"]
    logits = (await server.post(path, input=TEXTS[0], use_activation=False)).json()["data"][0]["probs"]
    assert torch.tensor(logits).softmax(0).tolist() == pytest.approx(answer["data"][0]["probs"], abs=1e-6)


@pytest.mark.parametrize(
    ("problem", "num_labels"),
    [("multi_label_classification", 3), ("regression", 2), ("regression", 1), (None, 1), (None, 2)],
)
async def test_the_kind_of_problem_decides_how_logits_become_scores(
    tmp_path: Path, problem: str | None, num_labels: int
) -> None:
    changes = {"num_labels": num_labels, "problem_type": problem}
    model = save_encoder(tmp_path, "DistilBert", "ForSequenceClassification", None, **changes)
    expected = probabilities(model, tmp_path, TEXTS[0])
    async with pooled_server(tmp_path) as server:
        found = (await server.post("/predict", inputs=TEXTS[0])).json()
        check(found, expected, [f"LABEL_{at}" for at in range(num_labels)])
        [entry] = (await server.post("/classify", input=TEXTS[0])).json()["data"]
        assert entry["probs"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pad", [None, 0, EOS])
async def test_a_decoder_classifies_by_the_last_token_that_is_no_padding(
    pad: int | None, tmp_path: Path
) -> None:
    """The tokenizer ends each text with `EOS`, which many checkpoints also name as the padding."""
    model = save_classifier(tmp_path, 5, pad_token_id=pad)
    edit(tmp_path / "config.json", id2label={"0": "a", "2": 3, "x": "y"})
    edit(tmp_path / "config.json", num_labels=5)
    ids = Tokenizer.from_directory(tmp_path).encode(TEXTS[0], add_special_tokens=True)
    given = [ids, [*ids, EOS], [EOS, EOS]]
    with torch.inference_mode():
        expected = [model(torch.tensor([each])).logits[0].softmax(0).tolist() for each in given]
    async with pooled_server(tmp_path) as server:
        found = (await server.post("/predict", inputs=TEXTS[0])).json()
        check(found, expected[0], ["a", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"])
        entries = (await server.post("/classify", input=given)).json()["data"]
        for entry, probs in zip(entries, expected, strict=True):
            assert entry["probs"] == pytest.approx(probs, abs=1e-4)
        assert (await server.http.get("/info")).json()["model_pipeline_tag"] == "text-classification"


@pytest.mark.parametrize(
    ("path", "body", "status", "where"),
    [
        ("/predict", {"inputs": []}, 422, "inputs"),
        ("/predict", {"inputs": ["a", "b", "c"]}, 422, "inputs"),
        ("/predict", {"inputs": [["a"], "b"]}, 422, "inputs[1]"),
        ("/predict", {"inputs": [["a"], []]}, 422, "inputs[1]"),
        ("/predict", {"inputs": [["a", ""]]}, 422, "inputs[0]"),
        ("/predict", {"inputs": 3}, 422, "inputs"),
        ("/predict", {"inputs": [["a"]] * 2049}, 413, "inputs"),
        ("/classify", {"input": []}, 400, "input"),
        ("/classify", {"input": ["a", ""]}, 400, "input[1]"),
        ("/classify", {"input": "a b " * 200}, 400, "input"),
        ("/classify", {}, 400, "input"),
        ("/v1/embeddings", {"input": "a"}, 400, "it classifies texts"),
        ("/rerank", {"query": "a", "documents": ["b"]}, 400, "3 labels"),
        ("/generate", {"inputs": "a"}, 400, "model"),
    ],
)
async def test_bad_requests_name_the_field(
    server: PooledServer, path: str, body: dict[str, Any], status: int, where: str
) -> None:
    answer = await server.post(path, **body)
    assert answer.status_code == status, answer.text
    assert where in answer.text


async def test_other_models_say_that_they_do_not_classify(tmp_path: Path) -> None:
    save_embedder(tmp_path, "lasttoken")
    async with pooled_server(tmp_path) as server:
        for path, field, status in (("/predict", "inputs", 424), ("/classify", "input", 400)):
            answer = await server.post(path, **{field: "a"})
            assert answer.status_code == status and "has no labels" in answer.text
