"""Variants that a native family does not compute fall back to the code of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import architectures
from tests.support.generic import LENGTHS, MAX_CONTEXT, run_steps
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError, NotInFamily
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.recognise import is_native

Checkpoint = Callable[[str], Path]


def changed(checkpoint: Path, folder: Path, **values: Any) -> ModelFiles:
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return ModelFiles("tiny", None, "directory", folder)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("bloom", "apply_residual_connection_post_layernorm", True),
        ("gemma", "hidden_act", "silu"),
        ("llama", "partial_rotary_factor", 0.5),
        ("gemma3_text", "attn_logit_softcapping", 2.0),
        ("phimoe", "num_experts_per_tok", 1),
        ("deepseek_v2", "norm_topk_prob", True),
        ("gpt_neox", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.2}),  # 3 of 16 dims
    ],
)
def test_a_variant_that_no_family_has_is_computed_by_transformers(
    checkpoint: Checkpoint, tmp_path: Path, kind: str, key: str, value: object
) -> None:
    files = changed(checkpoint(kind), tmp_path, **{key: value})
    with pytest.raises(NotInFamily, match=r"partial_rotary|softcap|supported|2 experts|be even|norm_topk_"):
        OpenModel(files, model_impl="native")
    with OpenModel(files, model_impl="auto") as opened:
        assert opened.is_generic and opened.why_generic
        model = opened.load(ops.Packing(is_exact=True), MAX_CONTEXT)
    assert not isinstance(model, EncoderModel)
    ids = [architectures.random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    assert run_steps(model, ids, architectures.references(tmp_path, ids)) < 1e-3


def test_keys_that_a_class_does_not_have_do_not_count(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = changed(checkpoint("gpt2"), tmp_path, num_key_value_heads=2, head_dim=8, intermediate_size=7)
    with OpenModel(found, model_impl="auto") as opened:
        model = opened.load(ops.Packing(is_exact=True), MAX_CONTEXT)
        assert not opened.is_generic
    assert not isinstance(model, EncoderModel)
    ids = [architectures.random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    assert run_steps(model, ids, architectures.references(tmp_path, ids)) < 1e-3


def test_where_neither_can_both_reasons_are_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    values = {"partial_rotary_factor": 0.5, "hidden_size": 65}
    files = changed(checkpoint("llama"), tmp_path, **values)
    with pytest.raises(ModelLoadError, match=r"rotates whole heads.*; and transformers' code: "):
        OpenModel(files, model_impl="auto")


@pytest.mark.parametrize("architecture", ["Gemma3Model", "Gemma3ForSequenceClassification"])
def test_gemma_3_with_eyes_is_not_its_text_model(architecture: str) -> None:
    assert is_native({"architectures": [architecture], "hidden_size": 64})
    parts = {"text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 32}}
    assert not is_native({"architectures": [architecture], **parts})
