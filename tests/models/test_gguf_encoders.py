"""GGUF files of embedding and ranking models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from tests.support.encoders import logits_of, random_ids, states_of
from tests.support.gguf_bytes import Tensor, gguf_bytes, write
from tests.support.gguf_encoders import CASES, MadeEncoder, make
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.gguf_module import find_module
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.recognise import read_gguf_module
from tgi_asgi.models.pooling import read_gguf_pooling
from tgi_asgi.runner.encoder import EncoderRunner
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import StepPlan, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import Pooling, PoolingKind

EXACT = 1e-5  # of the largest value; correct results are within 5e-6
CLOSE = 0.98  # cosine with 8-bit weights and activations
LENGTHS = (5, 1, 60, 33)
TEXTS = ("short a-b Cd", "H\u00e9  there\nxyz", "")
EMBEDDING = [name for name in CASES if name != "bert-ranking"]
OF_MODELS = [pytest.param(name, marks=() if name == "bert" else pytest.mark.models) for name in EMBEDDING]

pytestmark = pytest.mark.demo  # llama.cpp's converter is fetched
Maker = Callable[[str], MadeEncoder]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return a function that makes a case's files, once for all tests here."""
    kept: dict[str, MadeEncoder] = {}

    def get(name: str) -> MadeEncoder:
        if name not in kept:
            kept[name] = make(CASES[name], tmp_path_factory.mktemp(name))
        return kept[name]

    return get


@contextmanager
def loaded(encoder: MadeEncoder, form: str) -> Iterator[tuple[LoadedModel, EncoderRunner]]:
    dtype = "float32" if form == "f32" else "auto"
    settings = Settings(dtype=dtype, num_threads=2, thread_nice=0, max_batch_prefill_tokens=512)
    model = load(settings, encoder.file(form))
    assert isinstance(model.runner, EncoderRunner)
    try:
        yield model, model.runner
    finally:
        model.runner.close()


def pooled(runner: EncoderRunner, pooling: Pooling, prompts: list[list[int]]) -> list[np.ndarray]:
    rows = [StepRow(slot, ids, 0, [[]], True, pooling=pooling) for slot, ids in enumerate(prompts)]
    result = runner.run(StepPlan(0, rows))
    return [np.asarray(result.pooled[slot]) for slot in range(len(rows))]


@pytest.mark.parametrize("name", OF_MODELS)
def test_vectors_are_those_of_transformers(name: str, made: Maker) -> None:
    encoder = made(name)
    prompts = [random_ids(length, length) for length in LENGTHS]
    expected = [states_of(encoder.module, ids).mean(0).numpy() for ids in prompts]
    with loaded(encoder, "f32") as (model, runner):
        assert model.info.embedding is not None
        assert model.info.embedding.pooling.kind is PoolingKind.MEAN
        for found, wanted in zip(
            pooled(runner, model.info.embedding.pooling, prompts), expected, strict=True
        ):
            np.testing.assert_allclose(found, wanted, atol=EXACT * float(np.abs(wanted).max()), rtol=0)
    with loaded(encoder, "q8_0") as (_, runner):
        for found, wanted in zip(pooled(runner, Pooling(PoolingKind.MEAN), prompts), expected, strict=True):
            assert found @ wanted >= CLOSE * np.linalg.norm(found) * np.linalg.norm(wanted)


@pytest.mark.models
def test_scores_are_those_of_transformers(made: Maker) -> None:
    encoder = made("bert-ranking")
    ids = random_ids(40)
    with loaded(encoder, "f32") as (model, runner):
        assert model.info.classification is not None
        assert model.info.classification.labels == ("relevance",)
        found = pooled(runner, Pooling(PoolingKind.LOGITS, (0,)), [ids])
        np.testing.assert_allclose(found[0], logits_of(encoder.module, ids), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", pytest.param("bert-unigram", marks=pytest.mark.models)])
def test_texts_become_the_same_tokens(name: str, made: Maker) -> None:
    encoder = made(name)
    own = tokenizers.Tokenizer.from_file(str(encoder.folder / "tokenizer.json"))
    with GgufFile.open(encoder.file("f32").path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=True) == own.encode(text).ids
    assert tokenizer.encode_pair("ab", "cd")[0] == own.encode("ab", "cd").ids


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention.causal": True}, "attention.causal"),
        ({"attention.head_count": 5}, "must be a multiple of 5"),
        ({"rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ({"attention.layer_norm_epsilon": None}, "lacks `attention.layer_norm_epsilon`"),
        ({"block_count": 0}, "must be in"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    changes: Mapping[str, Any], reason: str, made: Maker
) -> None:
    module = find_module("bert")
    assert module is not None
    with GgufFile.open(made("bert").file("f32").path) as file:
        file.metadata.update({f"bert.{key}": value for key, value in changes.items()})
        with pytest.raises(ModelLoadError, match=reason):
            read_gguf_module(module, file)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("token_types.weight", "DistilBERT"), ("position_embd.weight", "position_embeddings")],
)
def test_a_file_without_a_tensor_is_refused(missing: str, reason: str, made: Maker, monkeypatch: Any) -> None:
    opened = GgufFile.open

    def without(path: Path) -> GgufFile:
        file = opened(path)
        del file.tensors[missing]
        return file

    monkeypatch.setattr(GgufFile, "open", without)
    with pytest.raises(ModelLoadError, match=reason), loaded(made("bert"), "f32"):
        pass


def test_the_layers_of_a_ranking_head_are_not_ignored(made: Maker, monkeypatch: Any) -> None:
    opened = GgufFile.open

    def with_head(path: Path) -> GgufFile:
        file = opened(path)
        file.tensors["cls.output.weight"] = file.tensors["blk.0.attn_q.weight"]
        return file

    monkeypatch.setattr(GgufFile, "open", with_head)
    with pytest.raises(ModelLoadError, match="need a pooler"):
        OpenModel(made("bert").file("f32"), model_impl="auto")


def test_dense_layers_follow_the_pooling(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    wide, narrow = (random.standard_normal(shape).astype(np.float32) for shape in ((12, 8), (8, 12)))
    tensors = [
        Tensor(f"dense_{number}.weight", matrix.shape[::-1], 0, matrix.tobytes())
        for number, matrix in ((3, narrow), (2, wide))
    ]
    metadata = {"general.architecture": "gemma-embedding", "gemma-embedding.pooling_type": 1}
    path = write(tmp_path / "dense.gguf", gguf_bytes(metadata, tensors))
    with GgufFile.open(path) as file:
        found = read_gguf_pooling(file)
    assert found.kind is PoolingKind.MEAN
    vector = random.standard_normal(8).astype(np.float32)
    first, second = found.dense
    np.testing.assert_allclose(second.apply(first.apply(vector)), narrow @ (wide @ vector), rtol=1e-5)


def test_an_architecture_that_is_not_served_is_refused_with_a_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "jina.gguf", gguf_bytes({"general.architecture": "jina-bert-v2"}, []))
    files = ModelFiles("jina", None, "gguf", path)
    with pytest.raises(ModelLoadError, match="neither this server nor transformers"):
        OpenModel(files, model_impl="auto")
