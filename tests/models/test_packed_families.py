"""Families that look for matrices by name, in files that hold only the names of their packed parts.

Of GPT-2, whose files have matrices transposed, the packed ones are as a `Linear` has them.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.families import CASES
from tests.support.family_case import FamilyCase
from tests.support.family_files import Reference, checkpoint, reference
from tests.support.family_scores import score
from tests.support.like_llama import LIKE_LLAMA, make
from tests.support.quantised import compressed_tensors, gptq_tensors, random_codes
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.types import PromptLogprobs

CONFIGS = {
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
}
# What the tools leave as it is.
KEPT = ("conv1d.weight", "mlp.gate.weight", "shared_expert_gate.weight", "router.layer.weight")


def write_both(
    source: Path, recipe: str, folder: Path, *, is_turned: bool = False
) -> tuple[ModelFiles, ModelFiles]:
    """Write a checkpoint with layer matrices of four bits, and with what they decode to."""
    torch.manual_seed(4)
    packed, decoded = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        packed[name] = decoded[name] = tensor
        if tensor.dim() == 2 and re.search(r"\.(layers|h)\.", name) and not name.endswith(KEPT):
            rows, columns = tensor.shape[::-1] if is_turned else tensor.shape
            matrix = random_codes(rows, columns, 32, is_centred=True)
            parts = gptq_tensors(matrix) if recipe == "gptq" else compressed_tensors(matrix, is_centred=True)
            del packed[name]
            packed |= {name.removesuffix("weight") + part: values for part, values in parts.items()}
            weights = matrix.weights()
            decoded[name] = weights.T.contiguous() if is_turned else weights
    found = []
    for kind, tensors, changes in (
        ("packed", packed, {"quantization_config": CONFIGS[recipe]}),
        ("decoded", decoded, {}),
    ):
        shutil.copytree(source, folder / kind)
        save_file(tensors, folder / kind / "model.safetensors")
        config = folder / kind / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        found.append(ModelFiles(kind, None, "directory", folder / kind))
    return found[0], found[1]


def families_and_recipes() -> list[Any]:
    """Return the pairs; `make test` has both recipes, and each family once."""
    names = ["granite_hybrid-dense", "granite_hybrid", "granitemoeshared", "qwen3_next", "gpt2"]
    return [
        pytest.param(name, recipe, marks=() if (at + turn) % 2 == 0 else pytest.mark.models)
        for at, name in enumerate(names)
        for turn, recipe in enumerate(CONFIGS)
    ]


@pytest.mark.parametrize(("name", "recipe"), families_and_recipes())
def test_packed_matrices_are_found(name: str, recipe: str, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    both = write_both(checkpoint(case).path, recipe, tmp_path, is_turned=name == "gpt2")
    check_same(case, both, reference(case))


@pytest.mark.parametrize(
    "name",
    [
        "internlm2-biases",
        "chatglm",
        "deepseek-renormalised",
        pytest.param("qwen", marks=pytest.mark.models),
    ],
)
def test_packed_matrices_of_models_with_code_of_their_own_are_found(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in LIKE_LLAMA if case.name == name)
    found = make(replace(case, same=replace(case.same, gguf=())), tmp_path)
    both = write_both(tmp_path / "published", "gptq", tmp_path)
    check_same(case.same, both, found)


def check_same(case: FamilyCase, both: tuple[ModelFiles, ModelFiles], prompt: Reference) -> None:
    """Check that the packed and the decoded checkpoint give the same."""
    packed, decoded = (score(case, files, prompt, "float32") for files in both)
    assert [each.token_id for each in packed.sampled] == [each.token_id for each in decoded.sampled]

    def values(prompt: PromptLogprobs) -> list[float]:
        return [logprob for logprob, _ in prompt if logprob is not None]

    found, expected = values(packed.prompt_logprobs), values(decoded.prompt_logprobs)
    assert len(found) > 10
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-3)
