"""Gated delta nets as a whole: faults planted in their code are visible against `transformers`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from tests.support import family_maker
from tests.support.family_files import checkpoint, reference
from tests.support.family_scores import differences, score
from tests.support.family_states import STATE_CASES
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.recurrent import GatedDelta

CASE = next(case for case in STATE_CASES if case.name == "qwen3_5")
FAULTY = 1e-2  # as in tests/models/test_families.py


def changed(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return the function with some of its arguments overridden."""
    return lambda *args, **given: function(*args, **{**given, **options})


_WEIGHT = ops.DeltaRuleWeight


def of_other_heads(*args: Any, **given: Any) -> ops.DeltaRuleWeight:
    return replace(_WEIGHT(*args, **given), is_tiled=True)


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "gates before the norm": ("gated_norm", changed(ops.gated_norm, is_gate_first=True)),
    "gates of another scale": ("gated_norm", changed(ops.gated_norm, gate_scale=2.0)),
    "no silu behind the convolution": ("short_conv", changed(ops.short_conv, has_silu=False)),
    "heads with others' keys": ("DeltaRuleWeight", of_other_heads),
    "no output gates": ("attention", changed(ops.attention, gate=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_code_that_is_wrong_differs(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(ops, name, wrong)
    found = reference(CASE)
    job = score(CASE, checkpoint(CASE), found, "float32")
    assert differences(job, found).max() > FAULTY


def test_keys_that_are_not_normed_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the fault in `transformers`, as the kernel always normalises keys."""
    monkeypatch.setattr(modeling_qwen3_5, "l2norm", lambda x, **options: x / x.shape[-1] ** 0.5)
    found = reference(CASE)
    wrong = family_maker.logprobs(CASE, checkpoint(CASE).path, found.all_ids)
    assert np.abs(wrong - found.logprobs).max() > FAULTY


def test_the_step_is_recorded() -> None:
    """Check that the native family runs the model, not the code of `transformers`."""
    with OpenModel(checkpoint(CASE)) as opened:
        assert not opened.is_generic
        model = opened.load(ops.Packing(is_exact=True), 64)
        assert isinstance(model, Decoder)
        assert [type(layer.recurrent) for layer in model.layers].count(GatedDelta) == 3


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("linear_attn.conv1d.weight", None, "linear_attn.conv1d.weight"),
        ("linear_attn.in_proj_a.weight", None, "linear_attn.in_proj_a.weight"),
        ("linear_attn.in_proj_qkv.weight", (192, 128), "linear_attn.in_proj_qkv.weight"),
        ("linear_attn.A_log", (8,), "linear_attn.A_log"),
        ("linear_attn.norm.weight", (64,), "linear_attn.norm.weight"),
        ("linear_attn.in_proj_c.weight", (4, 128), "linear_attn.in_proj_c.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    folder = checkpoint(CASE).path
    shutil.copy(folder / "config.json", tmp_path)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (stem,) = {each.partition("layers.0.")[0] for each in tensors if "layers.0.linear_attn.norm" in each}
    tensors.pop(f"{stem}layers.0.{name}", None)
    if shape is not None:
        tensors[f"{stem}layers.0.{name}"] = torch.ones(shape)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with (
        OpenModel(ModelFiles("broken", None, "directory", tmp_path)) as opened,
        pytest.raises(ModelLoadError, match=message),
    ):
        opened.load(ops.Packing(is_exact=True), 64)


def test_names_may_be_those_of_a_model_that_sees(tmp_path: Path) -> None:
    """Read names one level deeper, where `transformers` 5 writes them for a text model alone, too."""
    folder, part = checkpoint(CASE).path, "model.language_model."
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    plain = {each.replace(part, "model."): tensor for each, tensor in tensors.items()}
    for names in (plain, {each.replace("model.", part, 1): tensor for each, tensor in plain.items()}):
        shutil.copy(folder / "config.json", tmp_path)
        safetensors.torch.save_file(names, tmp_path / "model.safetensors", {"format": "pt"})
        with OpenModel(ModelFiles("named", None, "directory", tmp_path)) as opened:
            opened.load(ops.Packing(is_exact=True), 64)
