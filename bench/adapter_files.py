"""LoRA adapters of random values, in the formats of `peft` and of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FUSED = ("qkv_proj", "gate_up_proj")  # names for several products together
_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_adapter(
    folder: Path, targets: Mapping[str, tuple[int, int]], rank: int, random: np.random.Generator
) -> None:
    """Write an adapter on all of a model's products, {path: (rows, columns)}, with small non-zero values."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for name, (rows, columns) in targets.items():
        if name.endswith(FUSED):
            continue
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = _matrix(random, rank, columns)
        tensors[f"{prefix}.lora_B.weight"] = _matrix(random, rows, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _matrix(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    matrix: np.ndarray = (random.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float16)
    return matrix


def write_gguf(folder: Path) -> None:
    """Write `adapter.gguf` next to an adapter of `write_adapter`, for a model of the architecture llama."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(folder / "adapter.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        _, _, _, _, layer, *module, kind, _ = name.split(".")
        suffix = {"lora_A": "lora_a", "lora_B": "lora_b"}[kind]
        writer.add_tensor(f"blk.{layer}.{_GGUF['.'.join(module)]}.weight.{suffix}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
