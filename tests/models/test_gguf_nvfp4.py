"""ModelOpt's NVFP4 as llama.cpp's converter writes it, with a second scale for each matrix or expert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import our_logits
from tests.support.families import CASES
from tests.support.family_files import checkpoint, convert
from tgi_asgi.formats.sources import ModelFiles

BY_NAME = {case.name: case for case in CASES}
IDS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(3)).tolist()
QUANTISED = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def save_nvfp4(source: Path, folder: Path) -> ModelFiles:
    """Write a checkpoint whose layers' products are random NVFP4, of which each has a scale of its own."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.rand(rows, columns // 16, generator=generator) * 200 + 20
        found |= {
            name: torch.randint(256, (rows, columns // 2), generator=generator).byte(),
            f"{name}_scale": scales.to(torch.float8_e4m3fn),
            f"{name}_scale_2": (torch.rand((), generator=generator) + 0.5) / (300 * columns**0.5),
            name.replace("weight", "input_scale"): torch.tensor(0.02),
        }
    save_file(found, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"quantization_config": QUANTISED}))
    return ModelFiles("nvfp4", None, "directory", folder)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_converted_model_computes_what_its_checkpoint_does(name: str, tmp_path: Path) -> None:
    made = save_nvfp4(checkpoint(BY_NAME[name]).path, tmp_path / "checkpoint")
    convert(made.path, ("f32",), tmp_path)
    file = tmp_path / "f32.gguf"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    scale = next(tensor for key, tensor in tensors.items() if "ffn_down" in key and key.endswith(".scale"))
    assert scale.shape[0] == (1 if name == "llama" else 8), "the converter writes other scales"
    expected = our_logits(made, IDS).log_softmax(-1)
    assert float(expected.std()) > 0.5, "flat logits prove nothing"
    ours = our_logits(ModelFiles("nvfp4", None, "gguf", file), IDS).log_softmax(-1)
    assert float((ours - expected).abs().max()) <= 1e-3
