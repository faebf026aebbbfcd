"""Prompt vectors against `transformers` and torch: each pooling mode, in chunks, next to decode rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import make_model, save_gguf
from tests.support.pooling_models import (
    Vector,
    dense,
    edit,
    files_of,
    pooled,
    save_classifier,
    save_embedder,
    states,
)
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.loading.recognise import read_gguf
from tgi_asgi.models.pooling import read_gguf_pooling, read_pooling
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepRow
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling, PoolingKind, SamplingParams

KINDS = {
    "lasttoken": PoolingKind.LAST,
    "cls_token": PoolingKind.CLS,
    "mean_tokens": PoolingKind.MEAN,
    "max_tokens": PoolingKind.MAX,
    "mean_sqrt_len_tokens": PoolingKind.MEAN_SQRT_LEN,
    "weightedmean_tokens": PoolingKind.WEIGHTED_MEAN,
}
IDS = [(at * 37 + 11) % 160 for at in range(100)]
GREEDY = SamplingParams(temperature=0.0)


@contextmanager
def loaded(directory: Path, **settings: Any) -> Iterator[tuple[LoadedModel, HostRunner]]:
    values = {"dtype": "float32", "num_threads": 2, "thread_nice": 0, "max_batch_total_tokens": 2048}
    model = load(Settings(**{**values, **settings}), files_of(directory))
    assert isinstance(model.runner, HostRunner)
    try:
        yield model, model.runner
    finally:
        model.runner.close()


def run(runner: HostRunner, pooling: Pooling, chunk: int, *, beside: bool = False) -> Vector:
    """Pool `IDS` in chunks in slot 1; with `beside`, another sequence decodes in slot 0."""
    table, other = list(range(3, 10)), list(range(20, 30))
    starts = [SlotStart(1, GREEDY, 0, IDS)]
    if beside:
        runner.run(StepPlan(0, [StepRow(0, IDS[:9], 0, [other], True)], [SlotStart(0, GREEDY, 0, IDS[:9])]))
    for step, start in enumerate(range(0, len(IDS), chunk)):
        tokens = IDS[start : start + chunk]
        row = StepRow(1, tokens, start, [table], start + chunk >= len(IDS), pooling=pooling)
        rows = [StepRow(0, None, 9 + step, [other], True), row] if beside else [row]
        result = runner.run(StepPlan(step + 1, rows, starts))
        starts = []
        if beside:
            assert result.sampled[0] is not None
    assert result.sampled[-1] is None
    return result.pooled[len(rows) - 1]


@pytest.mark.parametrize("mode", KINDS)
def test_a_vector_is_that_of_transformers_whatever_the_chunks(tmp_path: Path, mode: str) -> None:
    model = save_embedder(tmp_path, mode)
    expected = pooled(states(model, IDS), mode)
    with loaded(tmp_path) as (found, runner):
        assert found.info.embedding is not None
        assert found.info.embedding.pooling.kind is KINDS[mode]
        whole = run(runner, found.info.embedding.pooling, 100)
        np.testing.assert_allclose(whole, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
        for chunk, beside in ((16, False), (33, True), (100, True), (1, False)):
            again = run(runner, found.info.embedding.pooling, chunk, beside=beside)
            np.testing.assert_array_equal(again, whole, f"chunks of {chunk}")


@pytest.mark.parametrize(
    ("kind", "is_bare", "architecture", "tied"),
    [
        ("Qwen3", True, "Qwen3ForCausalLM", True),
        ("Qwen3", True, "Qwen3ForCausalLM", False),
        ("Llama", False, "LlamaForCausalLM", False),
        ("Mistral", True, "MistralModel", False),
        ("Qwen2", True, "Qwen2Model", False),
    ],
)
def test_checkpoints_without_a_head_are_read(
    tmp_path: Path, kind: str, is_bare: bool, architecture: str, tied: bool
) -> None:
    changes: dict[str, Any] = {"sliding_window": None} if kind == "Mistral" else {}
    model = save_embedder(
        tmp_path, kind=kind, is_bare=is_bare, architecture=architecture, tie_word_embeddings=tied, **changes
    )
    with loaded(tmp_path) as (found, runner):
        assert not found.info.generates
        assert found.info.architecture == architecture
        vector = run(runner, Pooling(PoolingKind.LAST), 40)
        expected = states(model, IDS)[-1]
        np.testing.assert_allclose(vector, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_a_dense_layer_follows_the_pooling(tmp_path: Path) -> None:
    model = save_embedder(tmp_path, "mean_tokens", modules=("Dense",))
    with loaded(tmp_path) as (found, runner):
        embedding = found.info.embedding
        assert embedding is not None
        assert (embedding.dimensions, embedding.is_normalized) == (24, False)
        vector = run(runner, embedding.pooling, 64)
        expected = dense(tmp_path / "2_Dense", pooled(states(model, IDS), "mean_tokens"))
        np.testing.assert_allclose(vector, expected, atol=1e-4)


@pytest.mark.parametrize("size", [24, 64])
def test_a_dense_layer_may_add_its_input(tmp_path: Path, size: int) -> None:
    model = save_embedder(tmp_path, "mean_tokens", modules=("Dense",))
    folder = tmp_path / "2_Dense"
    torch.manual_seed(4)
    linear, residual = torch.randn(2, size, 64) / 8
    own = {} if size == 64 else {"residual.weight": residual}  # equal sizes need no matrix
    save_file(
        {"linear.weight": linear, "linear.bias": torch.zeros(size), **own}, folder / "model.safetensors"
    )
    edit(folder / "config.json", use_residual=True, out_features=size)
    with loaded(tmp_path) as (found, runner):
        assert found.info.embedding is not None
        vector = run(runner, found.info.embedding.pooling, 64)
        x = pooled(states(model, IDS), "mean_tokens")
        expected = dense(folder, x) + (residual @ x if own else x)
        np.testing.assert_allclose(vector, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["Dense", "Normalize"])
def test_a_module_for_tokens_is_a_reason(tmp_path: Path, kind: str) -> None:
    save_embedder(tmp_path, modules=(kind,))
    (tmp_path / f"2_{kind}").mkdir(exist_ok=True)
    (tmp_path / f"2_{kind}/config.json").write_text(json.dumps({"module_input_name": "token_embeddings"}))
    with loaded(tmp_path) as (found, _):
        assert found.info.embedding is None
        assert "other than the sentence's embedding" in found.info.why_no_pooling


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_classifier_gives_its_labels_logits(tmp_path: Path, num_labels: int) -> None:
    model = save_classifier(tmp_path, num_labels)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    with loaded(tmp_path) as (found, runner):
        assert not found.info.generates
        assert found.info.scoring is not None
        for chunk in (100, 16):
            vector = run(runner, found.info.scoring.pooling, chunk)
            np.testing.assert_allclose(vector, expected, atol=1e-3)
        probe = StepPlan(9, [StepRow(0, (0,), 0, [[0]], True)], [SlotStart(0, GREEDY, 0, (0,))])
        assert runner.run(probe).sampled[0] is not None


def test_tokens_logits_score_beside_a_stream(tmp_path: Path) -> None:
    model = save_embedder(tmp_path, None, is_bare=False)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0, -1, [7, 9]]
    with loaded(tmp_path, score_tokens="(,*") as (found, runner):
        assert found.info.generates
        assert found.info.scoring is not None
        for beside in (False, True):
            vector = run(runner, Pooling(PoolingKind.LOGITS, (7, 9)), 33, beside=beside)
            np.testing.assert_allclose(vector, expected, atol=1e-3)


def test_only_the_administrator_says_how_a_chat_model_embeds(tmp_path: Path) -> None:
    save_embedder(tmp_path, None, is_bare=False)
    with loaded(tmp_path) as (found, _):
        assert found.info.embedding is None
        assert "--pooling" in found.info.why_no_pooling
    with loaded(tmp_path, pooling="cls") as (found, _):
        assert found.info.embedding is not None
        assert found.info.generates
        assert found.info.embedding.pooling.kind is PoolingKind.CLS


@pytest.mark.parametrize(("number", "kind"), [(1, PoolingKind.MEAN), (3, PoolingKind.LAST), (0, None)])
def test_a_gguf_file_says_how_it_pools(tmp_path: Path, number: int, kind: PoolingKind | None) -> None:
    metadata = {"pooling_type": number, "rope.dimension_count": 16}
    path = save_gguf(make_model("Qwen3", head_dim=16), tmp_path / "tiny.gguf", "F32", metadata=metadata)
    family, _ = read_gguf(GgufFile.open(path.path).metadata, frozenset())
    assert family.architecture == "Qwen3ForCausalLM"
    assert read_gguf_pooling(GgufFile.open(path.path)).kind is kind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, PoolingKind.MEAN),
        ({"pooling_mode_cls_token": False}, PoolingKind.MEAN),
        ({"pooling_mode": ["max"]}, PoolingKind.MAX),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, PoolingKind.CLS),
        ({"pooling_mode": ["cls", "mean"]}, None),  # joined vectors
    ],
)
def test_a_pooling_is_read_as_by_sentence_transformers(
    tmp_path: Path, config: dict[str, Any], kind: PoolingKind | None
) -> None:
    save_embedder(tmp_path, "mean_tokens")
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    assert read_pooling(tmp_path).kind is kind


def test_a_pooling_that_is_not_known_is_a_reason_and_no_failure(tmp_path: Path) -> None:
    save_embedder(tmp_path, "attention")
    with loaded(tmp_path) as (found, _):
        assert found.info.embedding is None
        assert "pooling" in found.info.why_no_pooling


def test_layers_behind_the_pooling_must_fit(tmp_path: Path) -> None:
    save_embedder(tmp_path, modules=("Dense", "Dense"))
    shutil.copytree(tmp_path / "2_Dense", tmp_path / "3_Dense")
    with pytest.raises(ModelLoadError, match="expects 64 inputs, but gets 24"), loaded(tmp_path):
        pass


def test_a_dense_layer_behind_the_last_length_is_a_reason(tmp_path: Path) -> None:
    save_embedder(tmp_path, modules=("Normalize", "Dense"))
    with loaded(tmp_path) as (found, _):
        assert found.info.embedding is None
        assert "not between Pooling and Normalize" in found.info.why_no_pooling


@pytest.mark.parametrize("config", [{"false_token_id": 3}, {"true_token_id": -1}, {"true_token_id": "9"}, {}])
def test_a_score_without_a_yes_is_none(tmp_path: Path, config: dict[str, Any]) -> None:
    _save_logit_score(tmp_path, config)
    with loaded(tmp_path) as (found, _):
        assert found.info.scoring is None
        assert "LogitScore" in found.info.why_no_pooling


def test_tokens_of_a_score_must_be_the_model_s(tmp_path: Path) -> None:
    _save_logit_score(tmp_path, {"true_token_id": 1000, "false_token_id": 3})
    with pytest.raises(ModelLoadError, match="tokens that the model lacks"), loaded(tmp_path):
        pass


def _save_logit_score(directory: Path, config: dict[str, Any]) -> None:
    save_embedder(directory, None, is_bare=False)
    modules = [{"idx": 0, "path": "1_L", "type": "a.LogitScore"}]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_L").mkdir()
    (directory / "1_L/config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "options", "longest"),
    [
        ("bert", {"max_seq_length": 20}, 20),
        ("distilbert", {"max_seq_length": 20}, 20),  # a name of older versions
        ("bert", {"max_seq_length": 20, "tokenizer_args": {"model_max_length": 10}}, 10),
        ("bert", {"processor_kwargs": {"model_max_length": 10, "padding_side": "left"}}, 10),
    ],
)
def test_the_longest_text_is_that_of_sentence_transformers(
    tmp_path: Path, kind: str, options: dict[str, Any], longest: int, caplog: pytest.LogCaptureFixture
) -> None:
    save_embedder(tmp_path)
    (tmp_path / f"sentence_{kind}_config.json").write_text(json.dumps(options))
    assert read_pooling(tmp_path).max_tokens == longest
    assert not caplog.records


@pytest.mark.parametrize(
    ("file", "options", "warning"),
    [
        ("sentence_bert_config", {"config_args": {"num_hidden_layers": 2}}, "config_args of"),
        ("sentence_bert_config", {"tokenizer_args": {"add_eos_token": True}}, "tokenizer_args of"),
        ("sentence_bert_config", {"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs of"),
        ("config_sentence_transformers", {"default_prompt_name": "query"}, "the prompt 'query'"),
        ("config_sentence_transformers", {"truncate_dim": 16}, "cut to 16 dimensions"),
    ],
)
def test_what_sentence_transformers_would_do_and_the_server_does_not_is_logged(
    tmp_path: Path, file: str, options: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_embedder(tmp_path)
    (tmp_path / f"{file}.json").write_text(json.dumps(options))
    assert read_pooling(tmp_path).kind is PoolingKind.LAST
    assert [warning in record.getMessage() for record in caplog.records] == [True]


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    save_embedder(tmp_path)
    edit(tmp_path / "config.json", is_causal=False)
    with pytest.raises(ModelLoadError, match="asks for bidirectional attention"), loaded(tmp_path):
        pass


def test_score_tokens_must_be_tokens(tmp_path: Path) -> None:
    save_embedder(tmp_path, None)
    with pytest.raises(ModelLoadError, match="--score-tokens"), loaded(tmp_path, score_tokens="no,yes"):
        pass
