"""Products that tools took apart before they quantised them: experts, under the same names, and gate and up.

The names are those of files that llm-compressor 0.14, AutoRound 0.16 and GPTQModel 7 write of these families.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.families import CASES
from tests.support.family_files import checkpoint, reference
from tests.support.family_scores import score
from tests.support.quantised import compressed_tensors, random_codes
from tgi_asgi.formats.sources import ModelFiles

Tensors = dict[str, torch.Tensor]
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
_RENAMED = re.compile(r"(.*\.block_sparse_moe\.experts\.\d+)\.(w[123])\.weight")
_APART = re.compile(r"\.(experts\.\d+|mlp)\.(gate|up|down)_proj\.weight")
_KINDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def apart(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor of the publisher's file as the tools write it."""
    layer, _, last = name.rpartition(".mlp.experts.")
    granite = name.removesuffix("input_linear.weight").removesuffix("output_linear.weight")
    if renamed := _RENAMED.fullmatch(name):
        yield f"{renamed[1]}.{_KINDS[renamed[2]]}.weight", tensor
    elif granite.endswith("block_sparse_moe."):
        halves = tensor.chunk(2, 1) if "input_linear" in name else [tensor]
        for kind, half in zip(
            ["gate_proj", "up_proj"] if len(halves) == 2 else ["down_proj"], halves, strict=True
        ):
            for index, matrix in enumerate(half):
                yield f"{granite}experts.{index}.{kind}.weight", matrix
    elif layer:  # gpt-oss: gate and up alternate in the last dimension, which a matrix has first
        both, part = last.startswith("gate_up"), "bias" if last.endswith("_bias") else "weight"
        for start, kind in enumerate(["gate_proj", "up_proj"] if both else ["down_proj"]):
            for index, values in enumerate(tensor[..., start :: 2 if both else 1]):
                yield f"{layer}.mlp.experts.{index}.{kind}.{part}", values.T if values.dim() == 2 else values
    elif name.endswith(".gate_up_proj.weight"):
        for kind, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
            yield name.replace("gate_up_proj", kind), half
    else:
        yield name, tensor


def taken_apart(tensors: Tensors) -> Tensors:
    return {new: each.contiguous() for old, tensor in tensors.items() for new, each in apart(old, tensor)}


def quantised(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the tensors with random matrices of four bits in what was taken apart, and as they decode."""
    torch.manual_seed(4)
    packed, decoded = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if _APART.search(name):
            rows, columns = tensor.shape
            matrix = random_codes(rows, columns, 32, is_centred=True)
            del packed[name]
            parts = compressed_tensors(matrix, is_centred=True)
            packed |= {name.removesuffix("weight") + part: values for part, values in parts.items()}
            decoded[name] = matrix.weights()
    return packed, decoded


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "granitemoe",
        "gpt_oss",
        "phi3",
        pytest.param("phimoe", marks=pytest.mark.models),  # named like mixtral's
        pytest.param("granitemoeshared", marks=pytest.mark.models),
    ],
)
def test_what_was_taken_apart_is_what_is_in_the_publisher_s_file(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    source, expected = checkpoint(case).path, reference(case)

    def score_of(folder: str, tensors: Tensors, **config: object) -> list[float]:
        shutil.copytree(source, tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
        path = tmp_path / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        found = score(case, ModelFiles(name, None, "directory", tmp_path / folder), expected, "float32")
        return [logprob for logprob, _ in found.prompt_logprobs if logprob is not None]

    published = load_file(source / "model.safetensors")
    tensors = taken_apart(published)
    assert not set(published) & {key for key in tensors if _APART.search(key) and "mlp.down" not in key}
    assert score_of("apart", tensors) == score_of("published", published)
    packed, decoded = quantised(tensors)
    assert len(packed) > len(decoded)
    np.testing.assert_allclose(
        score_of("packed", packed, quantization_config=COMPRESSED), score_of("decoded", decoded), atol=1e-3
    )
