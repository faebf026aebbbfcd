"""Quality measurement: the exported weights, all logits of given tokens, errors and divergence."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.export_checkpoint import is_plain, read_weight, weight_names
from bench.quality import Errors
from bench.teacher import Teacher
from tests.support.checkpoints import make_model, reference_logits, save_gguf
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.loading.recognise import read_gguf


def test_exported_weights_are_what_transformers_computes_with(tmp_path: Path) -> None:
    model = make_model()
    files = save_gguf(model, tmp_path / "tiny.gguf", "Q4_1")
    file = GgufFile.open(files.path)
    try:
        family, config = read_gguf(file.metadata, frozenset(file.tensors))
        assert is_plain(config)
        weights = {name: read_weight(file, name, family, config) for name in weight_names(config)}
    finally:
        file.close()
    expected = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        assert np.array_equal(values, expected[name].detach().numpy()), name


def test_a_teacher_gives_the_logits_of_every_token(tmp_path: Path) -> None:
    model = make_model()
    files = save_gguf(model, tmp_path / "tiny.gguf", "Q4_1")
    ids = [3 + index * 7 % 90 for index in range(70)]  # more than the rows of one pass
    teacher = Teacher(files, "float32", 128)
    expected = reference_logits(model, ids)
    assert torch.allclose(teacher.logits(ids), expected, atol=1e-3)
    assert torch.allclose(teacher.logits(ids[:40])[-1], expected[39], atol=1e-3)
    assert torch.allclose(teacher.logits(ids[40:], 40), expected[40:], atol=1e-3)


def test_a_teacher_samples_the_same_text_from_the_same_seed(tmp_path: Path) -> None:
    files = save_gguf(make_model(), tmp_path / "tiny.gguf", "Q4_1")
    teacher = Teacher(files, "float32", 64)
    first = teacher.sample([1, 2, 3], 20, seed=0)
    assert len(first) == 20
    assert teacher.sample([1, 2, 3], 20, seed=0) == first != teacher.sample([1, 2, 3], 20, seed=1)


def test_errors_are_those_of_the_tokens_that_follow() -> None:
    oracle = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]))
    other = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]))  # the last row predicts nothing
    errors = Errors()
    errors.add(oracle, other, [0, 0, 1])
    found = errors.summary()
    assert found["positions"] == 2
    assert found["logprob_error_worst"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["logprob_error_mean"] == pytest.approx(math.log(2) / 2, abs=1e-4)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found["kl_worst"] == pytest.approx(divergence, rel=1e-3)
    assert found["kl_mean"] == pytest.approx(divergence / 2, rel=1e-3)
