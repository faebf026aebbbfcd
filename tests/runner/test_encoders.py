"""Encoders against `transformers`: prompts that share a step get the same vectors and scores as alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.support.encoders import logits_of, random_ids, save_encoder, states_of
from tests.support.pooling_models import edit, files_of, pooled, save_embedder, states
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic import encoder_check
from tgi_asgi.models.generic.backend import CpuBackend
from tgi_asgi.models.generic.reach import Reach, reach_of
from tgi_asgi.models.generic.whole import WholeLayers, _Probe
from tgi_asgi.ops import PlanError
from tgi_asgi.runner.encoder import EncoderRunner
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import StepPlan, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling, PoolingKind

LENGTHS = (5, 1, 100, 33, 128)
PAIRS = (Pooling(PoolingKind.LOGITS, (0,)), Pooling(PoolingKind.LOGITS, (0, 1)))


@contextmanager
def loaded(directory: Path, **settings: Any) -> Iterator[tuple[LoadedModel, EncoderRunner]]:
    values = {"dtype": "float32", "num_threads": 2, "thread_nice": 0, "max_batch_prefill_tokens": 512}
    model = load(Settings(**{**values, **settings}), files_of(directory))
    assert isinstance(model.runner, EncoderRunner)
    try:
        yield model, model.runner
    finally:
        model.runner.close()


def rows_of(pooling: Pooling, prompts: list[list[int]], second_start: int | None = None) -> list[StepRow]:
    return [
        StepRow(slot, ids, 0, [[]], True, pooling=pooling, second_start=second_start)
        for slot, ids in enumerate(prompts)
    ]


def vectors(runner: EncoderRunner, *arguments: Any) -> list[np.ndarray]:
    rows = rows_of(*arguments)
    result = runner.run(StepPlan(0, rows))
    return [result.pooled[index] for index in range(len(rows))]


def agree(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("kind", "head", "mode"),
    [
        ("Bert", "Model", "mean_tokens"),
        ("Bert", "ForMaskedLM", "cls_token"),
        pytest.param("Bert", "ForPreTraining", "max_tokens", marks=pytest.mark.models),
        ("Roberta", "ForMaskedLM", "mean_tokens"),
        ("XLMRoberta", "Model", "cls_token"),
        ("ModernBert", "Model", "cls_token"),
        pytest.param("ModernBert", "ForMaskedLM", "mean_tokens", marks=pytest.mark.models),
        ("NomicBert", "Model", "mean_tokens"),
        pytest.param("DistilBert", "Model", "mean_tokens", marks=pytest.mark.models),
        pytest.param("Electra", "Model", "mean_tokens", marks=pytest.mark.models),
        pytest.param("EuroBert", "Model", "mean_tokens", marks=pytest.mark.models),
        ("Gemma3Text", "Model", "mean_tokens"),
        pytest.param("Gte", "Model", "cls_token", marks=pytest.mark.models),
        pytest.param("Gte", "ForMaskedLM", "cls_token", marks=pytest.mark.models),
        ("GPT2", "Model", "lasttoken"),  # not an encoder, and no native family
        ("MPNet", "Model", "mean_tokens"),
        ("IBert", "Model", "mean_tokens"),  # tables of integers, for arithmetic that it does not use
        ("OlmoHybrid", "Model", "lasttoken"),  # carries states, which prompts in one row would share
        ("EmbeddingGemma2Text", "Model", "mean_tokens"),
        ("DebertaV2", "Model", "mean_tokens"),
        pytest.param("T5", "EncoderModel", "mean_tokens", marks=pytest.mark.models),
    ],
)
def test_vectors_of_one_step_are_those_of_transformers(
    tmp_path: Path, kind: str, head: str, mode: str
) -> None:
    model = save_encoder(tmp_path, kind, head, mode)
    prompts = [random_ids(length, length) for length in LENGTHS]
    with loaded(tmp_path) as (found, runner):
        assert found.info.embedding is not None
        assert (found.info.generates, found.info.implementation) == (False, "transformers")
        together = vectors(runner, found.info.embedding.pooling, prompts)
        for ids, vector in zip(prompts, together, strict=True):
            agree(vector, pooled(states_of(model, ids), mode))
            [alone] = vectors(runner, found.info.embedding.pooling, [ids])
            np.testing.assert_array_equal(alone, vector)
        assert found.info.is_batch_invariant


@pytest.mark.parametrize(
    ("kind", "num_labels", "has_types", "changes"),
    [
        ("Bert", 1, True, {}),
        pytest.param("Bert", 2, True, {}, marks=pytest.mark.models),
        pytest.param("NomicBert", 1, True, {}, marks=pytest.mark.models),
        ("XLMRoberta", 1, False, {}),
        ("ModernBert", 1, False, {"classifier_pooling": "mean"}),
        ("ModernBert", 1, False, {"classifier_pooling": "cls"}),
        pytest.param("DistilBert", 1, False, {}, marks=pytest.mark.models),
        pytest.param("Albert", 1, True, {}, marks=pytest.mark.models),
        ("DebertaV2", 1, False, {}),
        pytest.param("MPNet", 1, False, {}, marks=pytest.mark.models),
    ],
)
def test_labels_of_pairs_are_those_of_transformers(
    tmp_path: Path, kind: str, num_labels: int, has_types: bool, changes: dict[str, Any]
) -> None:
    model = save_encoder(tmp_path, kind, "ForSequenceClassification", None, num_labels=num_labels, **changes)
    start = 4 if has_types else None
    prompts = [random_ids(length, length) for length in (5, 100, 33)]
    with loaded(tmp_path) as (found, runner):
        assert found.info.scoring is not None
        assert found.info.scoring.pooling == PAIRS[num_labels - 1]
        for ids, vector in zip(prompts, vectors(runner, PAIRS[num_labels - 1], prompts, start), strict=True):
            assert len(vector) == num_labels
            np.testing.assert_allclose(vector, logits_of(model, ids, start), atol=1e-4)


@pytest.mark.parametrize("quantise", [None, "q8_0"])
def test_packed_weights_stay_near(tmp_path: Path, quantise: str | None) -> None:
    model = save_encoder(tmp_path, "Bert")
    ids = random_ids(50)
    with loaded(tmp_path, dtype="bfloat16", quantize=quantise) as (_, runner):
        [vector] = vectors(runner, Pooling(PoolingKind.MEAN), [ids])
    expected = pooled(states_of(model, ids), "mean_tokens").numpy()
    cosine = vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected)
    assert cosine > 0.99
    assert not np.array_equal(vector, expected)


def test_poolers_and_heads_may_be_there_or_not(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "Bert", "ForPreTraining")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    ids = random_ids(20)
    bare = {
        name.removeprefix("bert."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("cls.") and "pooler" not in name
    }
    for state in (tensors, bare):
        safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        with loaded(tmp_path) as (_, runner):
            [vector] = vectors(runner, Pooling(PoolingKind.CLS), [ids])
            agree(vector, states_of(model, ids)[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [("encoder.layer.1.attention.self.query.weight", "there is no tensor"), ("more", "no place for")],
)
def test_other_tensors_must_be_all_there(tmp_path: Path, name: str, message: str) -> None:
    save_encoder(tmp_path, "Bert")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    if name == "more":
        tensors["encoder.layer.1.attention.self.gate.weight"] = torch.zeros(3)
    else:
        del tensors[name]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=message), loaded(tmp_path):
        pass


def test_an_encoder_that_looks_into_its_neighbours_does_not_serve(tmp_path: Path) -> None:
    save_encoder(tmp_path, "MobileBert", true_hidden_size=64, embedding_size=64, intra_bottleneck_size=64)
    with pytest.raises(ModelLoadError, match=r"states differ by 0\.\d+ of the largest"), loaded(tmp_path):
        pass


@pytest.mark.parametrize("fault", ["reach", "positions"])
def test_a_fault_of_ours_does_not_pass_the_check(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder(tmp_path, "ModernBert" if fault == "reach" else "Roberta")
    if fault == "reach":
        monkeypatch.setattr(Reach, "ahead", 5)
    else:
        monkeypatch.setattr("tgi_asgi.models.generic.open_encoder.first_position", lambda model: 0)
    with (
        pytest.raises(ModelLoadError, match="fails its self-check"),
        loaded(tmp_path),
    ):
        pass


def test_what_is_no_number_does_not_pass_the_check() -> None:
    good, bad = np.ones((2, 3), np.float32), np.full((2, 3), np.nan, np.float32)
    assert encoder_check._relative(good, good) == 0
    for found, wanted in ((bad, good), (good, bad), (bad, bad)):
        assert encoder_check._relative(found, wanted) == float("inf")


def test_a_mask_of_the_model_s_own_is_a_reason_to_leave_it_to_its_code() -> None:
    probe = _Probe(16)
    states = torch.zeros(1, 2, 4, 8)
    probe.attend(torch.nn.Identity(), states, states, states, torch.full((1, 1, 4, 4), float("-inf")))
    assert probe.problems == ["a layer has a mask that is not a window, or that its own code makes"]


def test_the_layers_of_a_step_must_be_those_that_were_found() -> None:
    layers = WholeLayers([], CpuBackend(), max_tokens=32, max_rows=2, max_context=16)
    layers.begin([3])
    layers.end()
    layers._next = 1
    with pytest.raises(RuntimeError, match="called attention 1 times, not 0"):
        layers.end()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("BigBird", {}, "in another way to short texts"),
        ("ViT", {}, "does not produce vectors of tokens"),
    ],
)
def test_what_does_not_embed_is_refused_before_weights_are_read(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    save_encoder(tmp_path, kind, **changes)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors").unlink()
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=message), loaded(tmp_path):
        pass


def test_states_have_the_width_that_the_api_tells(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "attn_layers": ["local", "local"],
        "attention_head_size": 16,
        "axial_pos_embds": False,
    }
    save_encoder(tmp_path, "Reformer", is_decoder=False, local_attn_chunk_length=32, **sizes)
    with pytest.raises(ModelLoadError, match=r"\(27, 128\), and its hidden size is 64"), loaded(tmp_path):
        pass


def test_code_that_attends_by_itself_gets_no_more_than_it_has_room_for(tmp_path: Path) -> None:
    save_encoder(tmp_path, "T5", "EncoderModel")
    edit(tmp_path / "config.json", max_position_embeddings=None)
    edit(tmp_path / "tokenizer_config.json", model_max_length=None)
    with loaded(tmp_path) as (found, runner):
        assert found.info.embedding is not None
        assert found.info.embedding.max_tokens == runner.max_context == 8192  # four heads then take 1 GiB


def test_three_labels_are_no_score(tmp_path: Path) -> None:
    save_encoder(tmp_path, "Bert", "ForSequenceClassification", None, num_labels=3)
    with loaded(tmp_path) as (found, _):
        assert found.info.scoring is None
        assert "3 labels" in found.info.why_no_pooling


def test_a_prompt_in_pieces_is_no_plan(tmp_path: Path) -> None:
    save_encoder(tmp_path, "Bert")
    mean = Pooling(PoolingKind.MEAN)
    with loaded(tmp_path) as (found, runner):
        assert (runner.max_context, runner.traits.max_step_tokens, found.info.kv_bytes) == (130, 512, 0)
        probe = runner.run(StepPlan(0, [StepRow(0, (0,), 0, [[0]], True)]))
        assert probe.sampled[0] is not None
        for row in (
            StepRow(0, [5, 6], 1, [[]], True, pooling=mean),
            StepRow(0, [5, 6], 0, [[]], False, pooling=mean),
            StepRow(0, None, 0, [[]], True, pooling=mean),
            StepRow(0, [160], 0, [[]], True, pooling=mean),
            StepRow(0, [5] * 131, 0, [[]], True, pooling=mean),
            StepRow(0, [5], 0, [[]], True, pooling=mean, second_start=2),
            StepRow(0, [5], 0, [[]], True, pooling=Pooling(PoolingKind.LOGITS, (0,))),
        ):
            with pytest.raises(PlanError):
                runner.run(StepPlan(0, [row]))
        with pytest.raises(PlanError, match="more prompts or tokens"):
            runner.run(StepPlan(0, rows_of(mean, [[5] * 130] * 4)))


def test_a_step_holds_the_longest_prompt(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "Bert")
    ids = random_ids(130)
    with loaded(tmp_path, max_batch_prefill_tokens=16) as (_, runner):
        assert runner.traits.max_step_tokens == 130
        [vector] = vectors(runner, Pooling(PoolingKind.CLS), [ids])
        agree(vector, states_of(model, ids)[0])


def test_a_config_may_make_a_decoder_of_an_encoder(tmp_path: Path) -> None:
    save_encoder(tmp_path, "Bert")
    edit(tmp_path / "config.json", is_decoder=True)
    with loaded(tmp_path) as (_, runner):
        [short] = vectors(runner, Pooling(PoolingKind.CLS), [[5, 6]])
        [longer] = vectors(runner, Pooling(PoolingKind.CLS), [[5, 7, 8]])
    np.testing.assert_allclose(short, longer, atol=1e-5)


def test_a_decoder_may_look_ahead_if_it_only_embeds(tmp_path: Path) -> None:
    model = save_embedder(tmp_path, "mean_tokens", architecture="Qwen3Model")
    edit(tmp_path / "config.json", is_causal=False)
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    prompts = [random_ids(length, length) for length in (5, 1, 100)]
    with loaded(tmp_path, model_impl="auto") as (_, runner):
        for ids, vector in zip(prompts, vectors(runner, Pooling(PoolingKind.MEAN), prompts), strict=True):
            agree(vector, pooled(states(model, ids), "mean_tokens"))


@pytest.mark.parametrize("before", [None, 0, 4, 300])
@pytest.mark.parametrize("after", [None, 0, 7])
def test_a_reach_is_read_off_a_mask(before: int | None, after: int | None) -> None:
    def sees(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = torch.ones_like(key, dtype=torch.bool)
        if before is not None:
            seen &= query - key <= before
        return seen if after is None else seen & (key - query <= after)

    assert reach_of(sees, 4000) == Reach(before, after)


def test_other_masks_have_no_reach() -> None:
    assert reach_of(lambda _, __, query, key: (query + key) % 2 == 0, 1000) is None
    assert reach_of(lambda _, __, query, key: query // 8 == key // 8, 1000) is None
