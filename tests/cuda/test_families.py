"""Features that only some families have, on the CUDA runner with emulated kernels, against `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import make_device, save_with_tokenizer
from tests.cuda.emulated_shards import ShardDevice
from tests.emulation import library
from tests.support.checkpoints import make_model
from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.family_files import checkpoint, reference
from tests.support.family_scores import differences, score
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings

pytestmark = pytest.mark.thorough

# Heads of 64, the smallest that the kernels support.
_WIDE = {"head_dim": 64}
_FEW = {"num_attention_heads": 2, "num_key_value_heads": 1}
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "gemma2": _WIDE,
    "gemma3": _WIDE,
    "ministral": _WIDE,
    "olmo3": _FEW,
    "exaone4": _FEW,
    "smollm3-window": _FEW,
    "cohere2": _FEW,
    "bloom": {"n_head": 2},
    "mpt": {"n_heads": 2},
    "cohere-head-norms": _FEW,
    "stablelm-parallel": _FEW,
    "phi-head-norms": _FEW,
    "hunyuan": _WIDE,
    "glm4": _WIDE,
    "apertus": _FEW,
    "gpt2": {"n_head": 2},
    "falcon-rw": {"num_attention_heads": 2, "num_kv_heads": 2},
    "nemotron": {**_FEW, **_WIDE},
    "olmo": _FEW,
    "mixtral": _FEW,
    "qwen2_moe": _FEW,
    "qwen2_moe-dense-layers": _FEW,
    "qwen3_moe": _WIDE,
    "olmoe": _FEW,
    "phimoe": _FEW,
    "granitemoe": _FEW,
    "granitemoeshared": _FEW,
    # Routers that choose clearly also in float16.
    "glm4_moe-norms": {**_WIDE, "num_key_value_heads": 1},
    "ernie_moe": {**_WIDE, "num_key_value_heads": 1},
    "hunyuan_moe": _WIDE,
    "dots1": _FEW,
    "gpt_oss": _WIDE,
}
_USUAL = (
    "gemma2",
    "mpt",
    "cohere-head-norms",
    "hunyuan",
    "mixtral",
    "qwen2_moe",
    "glm4_moe-norms",
    "gpt_oss",
)
# Of a log-probability, in float16; or half of the error of `transformers` in bfloat16.
LARGEST, MEAN = 0.05, 0.02


def _widened(name: str) -> FamilyCase:
    (case,) = (case for case in CASES if case.name == name)
    return replace(case, name=f"{name}-wide", config={**case.config, **_CHANGES[name]})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    device = make_device()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    return device


def _compare(name: str, num_shard: int = 1) -> None:
    case = _widened(name)
    found = reference(case)
    apart = differences(score(case, checkpoint(case), found, "float16", num_shard=num_shard), found)
    assert len(apart) == len(found.all_ids) - 1, "another token was sampled"
    assert found.rounding is not None
    assert apart.max() <= max(LARGEST, found.rounding.max() / 2)
    assert apart.mean() <= max(MEAN, found.rounding.mean() / 2)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _USUAL else [pytest.mark.models]) for name in _CHANGES]
)
def test_log_probabilities_are_those_of_transformers(name: str, device: EmulatedDevice) -> None:
    _compare(name)
    assert device.replayed > 0


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",  # sinks, and biases of experts
        "qwen2_moe",  # with an MLP that all tokens use, and a gate for it
        pytest.param("glm4_moe-norms", marks=pytest.mark.models),  # also layers without experts
        pytest.param("granitemoeshared", marks=pytest.mark.models),  # a factor on what is added
        pytest.param("mixtral", marks=pytest.mark.models),
    ],
)
def test_experts_are_cut_among_two_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library.require()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", ShardDevice)
    _compare(name, num_shard=2)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("deepseek_v2", "needs latent attention, which"), ("lfm2_moe", "needs recurrent layers, which")],
)
def test_what_the_kernels_do_not_have_is_refused_by_name(
    name: str, lacking: str, device: EmulatedDevice
) -> None:
    (case,) = (case for case in CASES if case.name == name)
    with pytest.raises(
        ModelLoadError, match=f"{lacking} the GPU kernels do not have yet.*CUDA_VISIBLE_DEVICES="
    ):
        settings = Settings(thread_nice=0, num_threads=1, model_impl="native")
        load(settings, checkpoint(case))


def test_a_rotary_size_that_the_kernels_refuse_is_refused_at_once(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = make_model("StableLm", **sizes, partial_rotary_factor=30 / 64)
    files = save_with_tokenizer(model, tmp_path)
    with pytest.raises(ModelLoadError, match=r"head size 64 with 1 queries .* rotary sizes \[30\]"):
        settings = Settings(thread_nice=0, num_threads=1, model_impl="native")
        load(settings, files)
