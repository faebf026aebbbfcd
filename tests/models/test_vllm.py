"""GPTQ and AWQ checkpoints against vLLM, which has its own readers and kernels for them.

oracle/vllm.json holds vLLM's results, as recorded by oracle/record_vllm.py. vLLM computes in bfloat16, which
determines the tolerance. On a CPU its kernels support only these two: it refuses GPTQ with zero points, with
act-order or with eight bits (test_gptq.py covers those).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.oracle.record_vllm import digest
from tests.support.checkpoints import make_model, our_logits
from tests.support.quantised import save_quantised
from tgi_asgi.formats.sources import ModelFiles

MEAN, LARGEST = 0.03, 0.4  # of log-probabilities: bfloat16 costs 0.017 and 0.23
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq-4-symmetric": ("gptq", {"group": 128, "is_centred": True}),
    "awq-4": ("awq", {"group": 128}),
}
RECORDED = json.loads(Path(__file__).with_name("oracle").joinpath("vllm.json").read_text("utf-8"))
IDS = np.random.default_rng(3).integers(3, 160, 64).tolist()


def make_checkpoint(name: str, folder: Path) -> ModelFiles:
    """Write a checkpoint, the same each time."""
    recipe, options = RECIPES[name]
    model = make_model(**SHAPE)
    with torch.no_grad():
        model.lm_head.weight /= 4  # so that tokens are likely, but not certain
    return save_quantised(model, folder, recipe, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_log_probabilities_are_those_of_vllm(tmp_path: Path, name: str) -> None:
    files = make_checkpoint(name, tmp_path)
    recorded = RECORDED["models"][name]
    assert (digest(tmp_path), IDS) == (recorded["file"], RECORDED["ids"]), (
        "the checkpoint is not the recorded one: run tests/models/oracle/record_vllm.py"
    )
    apart = differences(name, files)
    assert apart.mean() <= MEAN
    assert apart.max() <= LARGEST


@pytest.mark.parametrize("name", RECIPES)
def test_zero_points_that_are_off_by_one_differ(tmp_path: Path, name: str) -> None:
    files = make_checkpoint(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in tensors:
        if key.endswith(".qzeros"):
            tensors[key] += 0x11111111  # one in each nibble
    save_file(tensors, tmp_path / "model.safetensors")
    assert differences(name, files).mean() > 10 * MEAN


def differences(name: str, files: ModelFiles) -> np.ndarray:
    """Return the errors of the exact log-probabilities against all that vLLM returned."""
    ours = our_logits(files, IDS).log_softmax(-1).numpy()
    rows = enumerate(RECORDED["models"][name]["logprobs"])
    return np.array(
        [abs(float(ours[row, int(token)]) - value) for row, given in rows for token, value in given]
    )
