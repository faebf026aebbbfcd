"""Families without a class in `transformers`: their files give what an equal model of its gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.family_files import Reference
from tests.support.family_scores import differences, score
from tests.support.like_llama import LIKE_LLAMA, LikeLlama, files_of, make
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.loading.recognise import is_native, read_gguf

EXACT = 5e-5  # of a log-probability; correct results are within 1e-5
LOOSE = 0.3  # with activations in int8

BY_NAME = {case.name: case for case in LIKE_LLAMA}
USUAL = ("internlm2", "minicpm", "refact", "deepseek")
MARKS = {name: () if name in USUAL else (pytest.mark.models,) for name in BY_NAME}
ROUNDED = [
    pytest.param(name, marks=MARKS[name], id=name) for name, case in BY_NAME.items() if "q8_0" in case.forms
]
FORMS = [
    pytest.param(name, form, marks=MARKS[name], id=f"{name}-{form}")
    for name, case in BY_NAME.items()
    for form in case.forms
]

pytestmark = pytest.mark.demo  # llama.cpp's converter is fetched

Made = tuple[LikeLlama, Path, Reference]
_made: dict[str, Made] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return the files of the case of this name, made once."""
    name = request.param
    if name not in _made:
        folder = tmp_path_factory.mktemp(name)
        _made[name] = (BY_NAME[name], folder, make(BY_NAME[name], folder))
    return _made[name]


@pytest.mark.parametrize(("made", "form"), FORMS, indirect=["made"])
def test_log_probabilities_are_those_of_an_equal_model(made: Made, form: str) -> None:
    case, folder, found = made
    job = score(case.same, files_of(case, form, folder), found, "float32")
    assert differences(job, found).max() <= EXACT
    assert job.token_ids == found.token_ids


@pytest.mark.parametrize("made", ROUNDED, indirect=True)
def test_default_arithmetic_stays_close(made: Made) -> None:
    case, folder, found = made
    apart = differences(score(case.same, files_of(case, "q8_0", folder), found, "auto"), found)
    assert np.median(apart) <= LOOSE


@pytest.mark.parametrize(
    ("made", "changes", "reason"),
    [
        ("internlm2", {"attention.scale": 0.5}, "attention.scale"),
        ("internlm2", {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "type 'dynamic'"),
        ("minicpm", {"residual_scale": float("nan")}, "residual_factor must be positive"),
        ("minicpm", {"logit_scale": -4.0}, "logits_scale must be positive"),
        ("minicpm", {"embedding_scale": "12"}, "must be a number"),
        ("refact", {"attention.max_alibi_bias": 4.0}, "attention.max_alibi_bias"),
        ("refact", {"attention.head_count": 0}, "must be in 1"),
        ("deepseek", {"expert_gating_func": 2}, "expert_gating_func"),
        ("deepseek", {"expert_used_count": 9}, "must be 1..8"),
        ("deepseek", {"expert_shared_count": None}, "lacks `expert_shared_count`"),
    ],
    indirect=["made"],
)
def test_a_file_that_says_something_else_is_refused(
    made: Made, changes: Mapping[str, Any], reason: str
) -> None:
    check_refused(made, changes, reason)


@pytest.mark.models
@pytest.mark.parametrize(
    ("made", "changes", "reason"),
    [
        ("baichuan-7b", {"block_count": 33}, "32 layers, which have rotary positions, or 40"),
        ("qwen", {"feed_forward_length": 383}, "must be even"),
        ("orion", {"rope.scaling.attn_factor": "1"}, "must be a number"),
        ("starcoder", {"rope.freq_base": 10000.0}, "rope.freq_base"),
        ("jais2", {"attention.layer_norm_epsilon": 0.0}, "norm_eps must be positive"),
        ("dbrx", {"attention.clamp_kqv": -1.0}, "must be positive"),
        ("dbrx", {"expert_used_count": 0}, "must be 1..8"),
    ],
    indirect=["made"],
)
def test_further_files_that_say_something_else_are_refused(
    made: Made, changes: Mapping[str, Any], reason: str
) -> None:
    check_refused(made, changes, reason)


def check_refused(made: Made, changes: Mapping[str, Any], reason: str) -> None:
    case, folder, _ = made
    with GgufFile.open(files_of(case, "f32", folder).path) as file:
        metadata, tensors = dict(file.metadata), frozenset(file.tensors)
    read_gguf(metadata, tensors)
    prefix = metadata["general.architecture"]
    metadata |= {f"{prefix}.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelLoadError, match=reason):
        read_gguf(metadata, tensors)


@pytest.mark.parametrize("made", ["minicpm"], indirect=True)
def test_factors_that_the_first_files_of_minicpm_lack_are_those_of_its_2b(made: Made) -> None:
    case, folder, _ = made
    with GgufFile.open(files_of(case, "f32", folder).path) as file:
        metadata = {key: value for key, value in file.metadata.items() if not key.endswith("_scale")}
        _, config = read_gguf(metadata, frozenset(file.tensors))
    assert config.embedding_factor == 12.0
    assert config.residual_factor == pytest.approx(1.4 / 3**0.5)
    assert config.logits_scale == pytest.approx(256 / 128)


@pytest.mark.parametrize(
    "architecture", sorted({case.architecture for case in LIKE_LLAMA if not case.is_read})
)
def test_their_checkpoints_are_left_to_other_code(architecture: str) -> None:
    assert not is_native({"architectures": [architecture], "model_type": "any"})


def test_files_of_xverse_are_refused_for_their_vocabulary() -> None:
    with pytest.raises(ModelLoadError, match="do not say how text becomes tokens"):
        read_gguf({"general.architecture": "xverse"}, frozenset())
