"""Experts of quantised checkpoints: the weights that their codes decode to, without becoming floats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import architectures
from tests.support.checkpoints import our_logits
from tests.support.generic import load_generic, run_steps
from tests.support.quantised import (
    awq_tensors,
    compressed_tensors,
    float8_tensors,
    gptq_tensors,
    random_codes,
)
from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles

Checkpoint = Callable[[str], Path]

EQUAL = 1e-3  # of the largest logit
ROUNDED = 5e-3  # for codes out of order, which become float16 as in AutoGPTQ
IDS = [architectures.random_ids(length, seed) for seed, length in enumerate((37, 17))]
STEPS = [[(0, 0, 20)], [(0, 20, 16), (1, 0, 17)], [(0, 36, 1)]]


def _integers(pack: Callable[[Any], dict[str, Tensor]], **options: Any) -> Any:
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        matrix = random_codes(rows, columns, 32, **options)
        return pack(matrix), matrix.weights()

    return quantise


# For each recipe: the quantisation in config.json, how a matrix is written, and its packed bytes per element.
CODES: dict[str, tuple[dict[str, Any], Any, float]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
        _integers(gptq_tensors),
        20 / 32,
    ),
    "act-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq", "desc_act": True},
        _integers(gptq_tensors, order_seed=3),
        2,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        _integers(awq_tensors),
        20 / 32,
    ),
    "compressed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        _integers(lambda matrix: compressed_tensors(matrix, is_centred=True), is_centred=True),
        20 / 32,
    ),
    "fp8": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        lambda weight: float8_tensors(weight, "block"),
        4,
    ),
}


def with_quantised_experts(source: Path, folder: Path, recipe: str) -> tuple[Path, Path]:
    """Copy a checkpoint twice: once with quantised experts, once with the values of their codes."""
    torch.manual_seed(0)
    config, quantise, _ = CODES[recipe]
    tensors = load_file(source / "model.safetensors")
    codes, floats = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".experts." not in name:
            continue
        made, floats[name] = quantise(weight)
        del codes[name]
        stem = name.removesuffix("weight")
        codes |= {stem + part: tensor.contiguous() for part, tensor in made.items()}
    for name, kept, extra in (("codes", codes, {"quantization_config": config}), ("floats", floats, {})):
        (folder / name).mkdir()
        for file in source.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        save_file(kept, folder / name / "model.safetensors", {"format": "pt"})
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return folder / "codes", folder / "floats"


# How a model names and orders the matrices of its experts does not depend on how each is written.
@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [("mixtral", recipe) for recipe in CODES]
    + [
        pytest.param("olmoe", recipe, marks=() if recipe == "gptq" else pytest.mark.models)
        for recipe in CODES
    ],
)
def test_quantised_experts_keep_their_codes(
    model_type: str, recipe: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    codes, floats = with_quantised_experts(checkpoint(model_type), tmp_path, recipe)
    loaded: Any = load_generic(codes, arithmetic=ops.Packing(is_exact=True))
    distance = run_steps(loaded, IDS, architectures.references(floats, IDS), STEPS)
    assert distance < (ROUNDED if recipe == "act-order" else EQUAL)
    found = (module.__dict__.get("tgi_experts") for module in loaded.module.modules())
    packed = sum(experts.nbytes for experts in found if experts is not None)
    tensors = load_file(floats / "model.safetensors").items()
    elements = sum(tensor.numel() for name, tensor in tensors if ".experts." in name)
    assert packed == pytest.approx(elements * CODES[recipe][2], rel=0.1)


def test_native_experts_in_act_order_are_decoded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders = with_quantised_experts(checkpoint("mixtral"), tmp_path, "act-order")
    ours, expected = (our_logits(ModelFiles("tiny", None, "directory", each), IDS[0]) for each in folders)
    assert float((ours - expected).abs().max() / expected.abs().max()) < ROUNDED
