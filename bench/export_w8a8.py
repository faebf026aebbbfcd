"""Write a checkpoint with its linear weights as INT8 W8A8, which vLLM's documentation recommends for x86.

    python -m bench.export_w8a8 checkpoint directory

compressed-tensors, "int-quantized": one scale per row of a weight; activations are quantised dynamically,
with one scale per token. Weights are rounded to nearest: the speed of such a checkpoint does not depend on
its calibration. Its quality does, so this checkpoint says nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_BITS, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [rows, columns] as int8, and the scale of each row as bfloat16 [rows, 1]."""
    values = weight.float()
    scale = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).bfloat16()
    return (values / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def export(checkpoint: Path, directory: Path) -> None:
    """Write the checkpoint: projections of the layers in int8, everything else in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            if name.endswith("_proj.weight"):
                tensors[name], tensors[f"{name}_scale"] = quantised(file.get_tensor(name))
            else:
                tensors[name] = file.get_tensor(name).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copyfile(path, directory / path.name)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="one model.safetensors with its JSON files")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    export(options.checkpoint, options.directory)


if __name__ == "__main__":
    main()
