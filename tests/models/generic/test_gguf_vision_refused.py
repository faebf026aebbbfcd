"""Projector files that cannot be used: named, they are refused; found beside a model, they are left out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.gguf_changes import random_changes
from tests.support.gguf_vision import Made, changed
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile, GgufStrings
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.generic.open import OpenGeneric
from tgi_asgi.models.generic.vision import check
from tgi_asgi.models.generic.vision.processor import VisionProcessor
from tgi_asgi.models.gguf_vision.projector import all_projectors
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings

pytestmark = [pytest.mark.demo, pytest.mark.filterwarnings("ignore")]  # the converter is fetched
VISION = "clip.vision."


def check_refused(made: Made, projector: Path, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason) as caught:
        OpenModel(replace(made.files, projector=projector), model_impl="auto")
    assert str(caught.value).startswith(f"--mmproj {projector}: ")
    assert "\n" not in str(caught.value)


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "metadata", "tensors", "reason"),
    [
        ("smolvlm", {"clip.projector_type": "adapter"}, {}, "type 'adapter' are not supported, only gemma3"),
        ("smolvlm", {"general.architecture": "llama"}, {}, "is not the file of a vision tower"),
        ("smolvlm", {f"{VISION}block_count": 1000}, {}, "there are fewer layers"),
        ("smolvlm", {f"{VISION}block_count": 1 << 30}, {}, "block_count must be in"),
        ("smolvlm", {f"{VISION}block_count": 2}, {}, "'v.blk.2.*' is|'v.blk.2.*', which this server"),
        ("smolvlm", {f"{VISION}attention.head_count": 5}, {}, "5 heads cannot share a width of 32"),
        ("smolvlm", {f"{VISION}embedding_length": 64}, {}, "'v.patch_embd.weight' has the shape"),
        ("smolvlm", {}, {"v.blk.1.ffn_up.weight": floats(49, 32)}, "has the shape"),
        ("smolvlm", {f"{VISION}image_size": 4200, f"{VISION}patch_size": 42}, {}, "image_size must be in"),
        ("smolvlm", {f"{VISION}image_size": 1 << 31}, {}, "image_size must be in"),
        ("smolvlm", {f"{VISION}image_size": 4000}, {}, "571 x 571 patches"),
        ("smolvlm", {f"{VISION}image_size": 42}, {}, "'v.position_embd.weight' has the shape"),
        ("smolvlm", {f"{VISION}patch_size": 0}, {}, "patch_size must be in"),
        ("smolvlm", {f"{VISION}image_std": np.zeros(3, np.float32)}, {}, "image_std must be positive"),
        ("smolvlm", {f"{VISION}image_mean": np.full(3, np.nan, np.float32)}, {}, "must be three numbers"),
        ("smolvlm", {f"{VISION}image_mean": np.zeros(2, np.float32)}, {}, "must be three numbers"),
        ("smolvlm", {f"{VISION}image_mean": "white"}, {}, "must be three numbers"),
        ("smolvlm", {f"{VISION}attention.layer_norm_epsilon": float("nan")}, {}, "must be in"),
        ("smolvlm", {f"{VISION}projector.scale_factor": 3}, {}, "4 patches cannot be joined by 3"),
        ("smolvlm", {f"{VISION}projector.scale_factor": 1}, {}, "has the shape"),
        ("smolvlm", {f"{VISION}preproc_image_size": 1 << 14}, {}, "preproc_image_size must be 28 to 8 times"),
        (
            "smolvlm", {"clip.projector_type": None, "clip.audio.projector_type": "ultravox"}, {},
            "it is for sound only",
        ),
        ("smolvlm", {"clip.projector_type": None}, {}, "has no clip.projector_type"),
        (
            "smolvlm", {f"{VISION}image_size": 1022, f"{VISION}preproc_image_size": 8176},
            {"v.position_embd.weight": floats(146**2, 32)}, "enlarge every image to 66846976 pixels",
        ),
        (
            "internvl", {f"{VISION}image_size": 980, f"{VISION}preproc_max_tiles": 64}, {},
            "enlarge every image to 61465600 pixels",
        ),
        (
            "gemma4", {f"{VISION}patch_size": 28, f"{VISION}projector.scale_factor": 16},
            {"v.patch_embd.weight": floats(32, 3, 28, 28)}, "enlarge every image to 56197120 pixels",
        ),
        ("smolvlm", {f"{VISION}norm_scale": 2.0}, {}, "norm_scale"),
        ("smolvlm", {f"{VISION}feature_layer": np.zeros(1, np.int32)}, {}, "`feature_layer` is"),
        ("smolvlm", {f"{VISION}attention.head_dim": 8}, {}, "attention.head_dim"),
        ("qwen2_5_vl", {f"{VISION}window_size": 1 << 20}, {}, "window_size must be in"),
        ("smolvlm", {}, {"v.blk.1.attn_q.weight": None}, "no tensor for '.*layers.1.*q_proj.weight'"),
        ("smolvlm", {}, {"v.blk.1.attn_q.weight": floats(16, 32)}, "has the shape"),
        ("smolvlm", {}, {"v.blk.1.attn_gate.weight": floats(32, 32)}, "'v.blk.1.attn_gate.weight', which"),
        ("smolvlm", {}, {"v.patch_embd.weight": None}, "there is no tensor 'v.patch_embd.weight'"),
        ("smolvlm", {}, {"mm.model.fc.weight": floats(128, 128)}, "it gives rows of 128 numbers"),
        ("gemma3", {}, {"mm.input_projection.weight": floats(32, 96)}, "it gives rows of 96 numbers"),
        ("gemma3", {}, {"mm.soft_emb_norm.weight": floats(7)}, "'mm.soft_emb_norm.weight' has the shape"),
        ("gemma3", {f"{VISION}projector.scale_factor": 0}, {}, "projector.scale_factor must be in"),
        ("qwen2_5_vl", {f"{VISION}n_wa_pattern": 0}, {}, "n_wa_pattern must be in"),
        ("qwen2_5_vl", {}, {"v.blk.0.attn_k.weight": None}, "there is no tensor 'v.blk.0.attn_k.weight'"),
        ("qwen2_5_vl", {}, {"v.blk.0.attn_k.weight": floats(32, 48)}, "attn_k.weight' has the shape"),
        ("qwen2_5_vl", {}, {"v.patch_embd.weight.1": None}, "there is no tensor 'v.patch_embd.weight.1'"),
        ("qwen2_5_vl", {}, {"mm.2.weight": floats(32, 128)}, "it gives rows of 32 numbers"),
        ("qwen2_5_vl", {"clip.projector_type": "gemma3"}, {}, "with text models of .* 'qwen2vl'"),
        ("mistral3", {f"{VISION}spatial_merge_size": 1}, {}, "which the tensors contradict"),
        ("mistral3", {f"{VISION}attention.head_count": 16}, {}, "heads of 2 have no two rotary axes"),
        ("mistral3", {f"{VISION}attention.layer_norm_epsilon": 1e-3}, {}, "must be 1e-05"),
        ("lfm2_vl", {f"{VISION}projector.scale_factor": 3}, {}, "cannot be cut into tokens of 48"),
        ("lfm2_vl", {f"{VISION}projector.scale_factor": 0}, {}, "projector.scale_factor must be in"),
        ("lfm2_vl", {f"{VISION}projector.scale_factor": 16}, {}, "a tile would have 65536 patches"),
        (
            "lfm2_vl", {f"{VISION}image_size": 1040}, {"v.position_embd.weight": floats(65**2, 32)},
            "a tile would have 1024 patches, with positions among 65 x 65",
        ),
        ("lfm2_vl", {f"{VISION}image_size": 128}, {}, "'v.position_embd.weight' has the shape"),
        ("lfm2_vl", {}, {"mm.2.weight": floats(32, 48)}, "it gives rows of 32 numbers"),
        ("lfm2_vl", {}, {"mm.1.weight": floats(48, 64)}, "has the shape"),
        ("lfm2_vl", {}, {"mm.1.weight": None}, "there is no tensor 'mm.1.weight'"),
        ("lfm2_vl", {}, {"mm.input_norm.bias": None}, "no tensor for '.*layer_norm.bias'"),
        ("lfm2_vl", {"clip.projector_type": "idefics3"}, {}, "with text models of .* 'lfm2'"),
        ("llava_next", {f"{VISION}image_grid_pinpoints": [28, 56, 56]}, {}, "pairs of multiples of 28"),
        ("llava_next", {f"{VISION}image_grid_pinpoints": [28, 57]}, {}, "pairs of multiples of 28"),
        ("llava_next", {f"{VISION}image_grid_pinpoints": []}, {}, "pairs of multiples of 28"),
        ("llava_next", {f"{VISION}image_grid_pinpoints": None}, {}, "pairs of multiples of 28"),
        ("llava_next", {f"{VISION}image_grid_pinpoints": [28, 56, 28, 4116]}, {}, "of 28 up to 4096, got"),
        ("llava_next", {f"{VISION}mm_patch_merge_type": "spatial"}, {}, "mm_patch_merge_type"),
        ("llava_next", {f"{VISION}feature_layer": [1, 2]}, {}, "`feature_layer` is"),
        ("llava_next", {}, {"model.image_newline": None}, "`mm_patch_merge_type` is spatial_unpad"),
        ("llava_next", {}, {"model.image_newline": floats(32)}, "'model.image_newline' has the shape"),
        ("llava_next", {}, {"mm.2.weight": floats(32, 32)}, "it gives rows of 32 numbers"),
        ("qwen3_5", {f"{VISION}is_deepstack_layers": [True, False, False]}, {}, "rows of the last only"),
        ("qwen3_5", {}, {"mm.2.weight": floats(32, 128)}, "it gives rows of 32 numbers"),
        ("qwen3_5", {"clip.projector_type": "qwen2.5vl_merger"}, {}, "with text models of .* 'qwen35'"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves_are_refused(
    name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any], reason: str,
    model_of: Callable[[str], Made], tmp_path: Path,
) -> None:  # fmt: skip
    made = model_of(name)
    assert made.files.projector is not None
    check_refused(made, changed(made.files.projector, tmp_path / "mmproj.gguf", metadata, tensors), reason)


SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
HEADS_OF_48 = dict.fromkeys(SIZES, 48)  # not 16, as the tensors have


@pytest.mark.parametrize(
    ("name", "metadata", "reason"),
    [
        ("lfm2_vl", {"attention.head_count_kv": [0, 2]}, "KV heads of 3 layers, got 2"),
        ("lfm2_vl", {"shortconv.l_cache": 0}, "shortconv.l_cache must be in"),
        ("lfm2_vl", {"shortconv.l_cache": 4}, "has the shape"),
        ("qwen3_5", {"ssm.time_step_rank": 3}, "must be whole heads, of which there are 3"),
        ("qwen3_5", {"ssm.group_count": 3}, "4 heads of values cannot share 3 of keys"),
        ("qwen3_5", {"ssm.group_count": 1}, "has the shape"),
        ("qwen3_5", {"ssm.state_size": 1 << 30}, "ssm.state_size must be in"),
        ("qwen3_5", {"ssm.conv_kernel": 3}, "has the shape"),
        ("qwen3_5", {"rope.dimension_count": 7}, "rope.dimension_count must be even"),
        ("qwen3_5", {"rope.dimension_sections": [1, 1, 1, 1]}, "must be three parts of 4"),
        ("qwen3_5", {"block_count": 4}, "no tensor for"),
        ("mistral3", HEADS_OF_48, "must have whole heads of 48 rows, in pairs"),
        ("qwen3_5", {"nextn_predict_layers": 3}, "block_count must be in"),
    ],
)
def test_text_models_that_contradict_themselves_are_refused(
    name: str, metadata: Mapping[str, Any], reason: str, model_of: Callable[[str], Made], tmp_path: Path
) -> None:
    made = model_of(name)
    text = changed_text(made, tmp_path / "text.gguf", metadata, {})
    with pytest.raises(ModelLoadError, match=reason):
        OpenModel(replace(made.files, path=text), model_impl="auto")


def changed_text(made: Made, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """Write a text model's file with other metadata, whose keys lack the architecture's name, and tensors."""
    with GgufFile.open(made.files.path) as file:
        items = file.metadata.items()
        lists = {key: each.to_list() for key, each in items if isinstance(each, GgufStrings)}
        kind = file.metadata["general.architecture"]
    own = {f"{kind}.{key}": value for key, value in metadata.items()}
    return changed(made.files.path, path, {**lists, **own}, tensors)


def test_a_file_of_another_model_is_refused(model_of: Callable[[str], Made]) -> None:
    made, other = model_of("gemma3"), model_of("smolvlm")
    assert other.files.projector is not None
    check_refused(made, other.files.projector, "not supported with text models of architecture 'gemma3'")


@pytest.mark.parametrize("size", [0, 3, 100, 2000, -1])
def test_a_file_that_was_cut_is_refused(size: int, model_of: Callable[[str], Made], tmp_path: Path) -> None:
    made = model_of("smolvlm")
    assert made.files.projector is not None
    cut = tmp_path / "mmproj.gguf"
    cut.write_bytes(made.files.projector.read_bytes()[:size])
    check_refused(made, cut, "mmproj.gguf")


def test_a_vocabulary_without_the_tokens_of_images_is_refused(
    model_of: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model_of("smolvlm")
    monkeypatch.setattr("tgi_asgi.models.gguf_vision.idefics3._FENCE", "<fence>")
    assert made.files.projector is not None
    check_refused(made, made.files.projector, "vocabulary has no token '<fence>'")


def test_a_file_beside_a_model_that_cannot_be_used_is_left_out(
    model_of: Callable[[str], Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = model_of("smolvlm")
    assert made.files.projector is not None
    metadata = {"clip.projector_type": "resampler"}
    beside = changed(made.files.projector, tmp_path / "mmproj.gguf", metadata, {})
    files = replace(made.files, projector=beside, is_projector_named=False)
    with caplog.at_level(logging.WARNING), OpenModel(files, model_impl="auto") as opened:
        assert opened.read_image_processor() is None
        assert isinstance(opened.load(ops.Packing(is_exact=True), 64), Decoder)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"for text only, as {beside} cannot be used: projectors of type 'resampler'")


def test_an_error_without_an_explanation_leaves_a_file_out_too(
    model_of: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: OpenGeneric, source: Any) -> None:
        raise RuntimeError("shape is invalid")

    monkeypatch.setattr(OpenGeneric, "image_processor", fail)
    files = replace(model_of("smolvlm").files, is_projector_named=False)
    with OpenModel(files, model_impl="auto") as opened:
        assert opened.kind == "native"
        assert isinstance(opened.load(ops.Packing(is_exact=True), 64), Decoder)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "cannot be used: RuntimeError: shape is invalid" in record.getMessage()
    assert record.exc_info
    with pytest.raises(RuntimeError, match="shape is invalid"):
        OpenModel(replace(files, is_projector_named=True), model_impl="auto")


def test_a_text_model_with_tensors_that_the_class_lacks_is_served_without_images(
    model_of: Callable[[str], Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The native family knows what old files have beside weights."""
    made = model_of("smolvlm")
    more = {"blk.0.attn_rot_embd.weight": floats(8)}
    text = changed_text(made, tmp_path / "old.gguf", {}, more)
    files = replace(made.files, path=text, is_projector_named=False)
    with caplog.at_level(logging.WARNING), OpenModel(files, model_impl="auto") as opened:
        assert opened.kind == "native"
    assert "'blk.0.attn_rot_embd.weight'" in caplog.text
    with pytest.raises(ModelLoadError, match=r"'blk\.0\.attn_rot_embd\.weight'"):
        OpenModel(replace(files, is_projector_named=True), model_impl="auto")


def test_native_code_reads_texts_only(model_of: Callable[[str], Made]) -> None:
    files = model_of("smolvlm").files
    with OpenModel(replace(files, is_projector_named=False), model_impl="native") as opened:
        assert opened.kind == "native"
    with pytest.raises(ModelLoadError, match="--model-impl native reads no images, and --mmproj is for them"):
        OpenModel(files, model_impl="native")


def test_several_shards_need_the_text_model_alone(model_of: Callable[[str], Made]) -> None:
    with (
        OpenModel(model_of("smolvlm").files, model_impl="auto") as opened,
        pytest.raises(ModelLoadError, match="leave --num-shard out, or add --mmproj none"),
    ):
        opened.cuts(2)


def test_a_file_beside_a_model_ends_no_start_that_succeeds_without_it(
    model_of: Callable[[str], Made], caplog: pytest.LogCaptureFixture
) -> None:
    files = replace(model_of("smolvlm").files, is_projector_named=False)
    settings = Settings(thread_nice=0, max_batch_size=4, num_threads=1, num_shard=2)
    loaded = load(settings, files)
    loaded.runner.close()
    assert loaded.shards is not None
    loaded.shards.close()
    assert (loaded.info.implementation, loaded.image_processor) == ("native", None)
    assert "--mmproj none" in caplog.text
    with pytest.raises(ModelLoadError, match="cannot be combined with --mmproj"):
        load(settings, model_of("smolvlm").files)


def test_too_large_models_may_fit_without_a_projector(
    model_of: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.runner.load.free_memory", lambda: 1 << 16)
    with pytest.raises(ModelLoadError, match=r"weights take .*, or --mmproj none to serve it for text only"):
        load(Settings(thread_nice=0), model_of("smolvlm").files)


@pytest.mark.parametrize("name", ["process", "whole"])
def test_the_self_check_names_what_leaves_a_file_out(
    name: str, model_of: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(check, "TESTED_CLASSES", frozenset())
    monkeypatch.setattr(VisionProcessor, name, fail)
    with (
        pytest.raises(ModelLoadError, match=r"images here \(ValueError: no\)\. Add --mmproj none"),
        OpenModel(model_of("smolvlm").files, model_impl="auto") as opened,
    ):
        opened.load(ops.Packing(is_exact=True), 64)


def test_every_kind_belongs_to_some_text_model() -> None:
    assert all(each.texts for each in all_projectors().values())


_NUMBERS: tuple[Any, ...] = (
    0,
    1,
    2,
    3,
    7,
    1 << 16,
    (1 << 32) - 1,
    -1.0,
    0.5,
    float("inf"),
    "text",
    True,
    [1, 2],
    [],
)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["smolvlm", "gemma3", "gemma4", "qwen2_5_vl", "mistral3", "lfm2_vl", "qwen3_5"]
)
def test_random_changes_are_served_or_refused(
    name: str, model_of: Callable[[str], Made], tmp_path: Path
) -> None:
    made, random = model_of(name), np.random.default_rng(5)
    assert made.files.projector is not None
    with GgufFile.open(made.files.projector) as file:
        keys = [key for key in file.metadata if key.startswith("clip.")]
        names = list(file.tensors)
    for _ in range(60):
        metadata: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for key in random.choice(keys, random.integers(3)):
            metadata[str(key)] = [None, *_NUMBERS][random.integers(len(_NUMBERS) + 1)]
        for each in random.choice(names, random.integers(3)):
            shape = random.integers(1, 5, random.integers(1, 5)).tolist()
            tensors[str(each)] = [None, floats(*shape)][random.integers(2)]
        path = changed(made.files.projector, tmp_path / "mmproj.gguf", metadata, tensors)
        with contextlib.suppress(ModelLoadError):
            OpenModel(replace(made.files, projector=path), model_impl="auto").close()


@pytest.mark.models
@pytest.mark.parametrize("name", ["lfm2_vl", "qwen3_5"])
def test_random_changes_of_a_text_model_are_served_or_refused(
    name: str, model_of: Callable[[str], Made], tmp_path: Path
) -> None:
    made = model_of(name)
    for metadata in random_changes(made.files.path, 5, 40):
        path = changed(made.files.path, tmp_path / "changed.gguf", metadata, {})
        files = replace(made.files, path=path, projector=made.files.projector)
        with contextlib.suppress(ModelLoadError), OpenModel(files, model_impl="auto") as opened:
            opened.load(ops.Packing(is_exact=True), 64)
