"""Files of many gigabytes that occupy no disk: data that is not read or compared is a hole.

A hole reads as zeros, so a model made of holes has all its weights and occupies their usual memory.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import safetensors.torch
import torch
import transformers

from tests.support import gguf_bytes
from tests.support.checkpoints import SHAPE, save_tokenizer
from tgi_asgi.formats.sources import ModelFiles

HOLE_BYTES = 5 << 30
_UNUSED_NAME = "model.layers.0.self_attn.rotary_emb.inv_freq"  # in some files, though never read
_ELEMENT_BYTES = {"F32": 4, "BF16": 2}
_GGUF_BF16 = 30


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    shape: Sequence[int]
    data: bytes | None = None  # None: a hole

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


def stretch(small: ModelFiles, path: Path) -> ModelFiles:
    """Write a copy of a model to `path` with a hole of `HOLE_BYTES` in the middle of its tensors."""
    if small.kind == "gguf":
        _stretch_gguf(small.path, path)
        return ModelFiles("large", None, "gguf", path)
    shutil.copytree(small.path, path)
    file = path / "model.safetensors"
    tensors = [
        _Tensor(name, "F32", list(tensor.shape), tensor.numpy().tobytes())
        for name, tensor in safetensors.torch.load_file(file).items()
    ]
    tensors.insert(len(tensors) // 2, _unused())
    file.unlink()
    _write_safetensors(file, tensors)
    return ModelFiles("large", None, "directory", path)


def sparse_checkpoint(path: Path, *, has_unused: bool = False, **changes: Any) -> ModelFiles:
    """Write a checkpoint of bfloat16 zeros, `SHAPE` with `changes`, optionally with an unused tensor."""
    config = transformers.LlamaConfig(**{**SHAPE, **changes}, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    tensors = [_Tensor(name, "BF16", list(tensor.shape)) for name, tensor in state.items()]
    if has_unused:
        tensors.insert(len(tensors) // 2, _unused())
    config.save_pretrained(path)
    _write_safetensors(path / "model.safetensors", tensors)
    save_tokenizer(path)
    return ModelFiles("sparse", None, "directory", path)


def sparse_gguf(path: Path, **changes: Any) -> ModelFiles:
    """Write the same as a GGUF file, with everything except its header after a hole of `HOLE_BYTES`.

    With `num_experts`, it uses OLMoE's architecture, whose MLPs are experts.
    """
    shape = {**SHAPE, **changes}
    num_experts = shape.get("num_experts")
    name = "olmoe" if num_experts else "llama"
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    keys = hidden // heads * shape["num_key_value_heads"]
    vocabulary, between = [hidden, shape["vocab_size"]], [hidden, shape["intermediate_size"]]
    layer = {
        "attn_norm": [hidden], "attn_q": [hidden, hidden], "attn_k": [hidden, keys], "attn_v": [hidden, keys],
        "attn_output": [hidden, hidden], "ffn_norm": [hidden], "ffn_gate": between, "ffn_up": between,
        "ffn_down": between[::-1],
    }  # fmt: skip
    if num_experts:
        for part in ("gate", "up", "down"):
            layer[f"ffn_{part}_exps"] = [*layer.pop(f"ffn_{part}"), num_experts]
        layer |= {
            "ffn_gate_inp": [hidden, num_experts], "attn_q_norm": [hidden], "attn_k_norm": [keys],
        }  # fmt: skip
    all_dims = {"token_embd": vocabulary, "output_norm": [hidden], "output": vocabulary} | {
        f"blk.{index}.{part}": dims
        for index in range(shape["num_hidden_layers"])
        for part, dims in layer.items()
    }
    at, tensors = HOLE_BYTES, []
    for part, dims in all_dims.items():
        tensors.append(gguf_bytes.Tensor(f"{part}.weight", dims, _GGUF_BF16, offset=at))
        at += -(-math.prod(dims) * 2 // 32) * 32
    numbers = {
        "vocab_size": shape["vocab_size"], "context_length": shape["max_position_embeddings"],
        "embedding_length": hidden, "block_count": shape["num_hidden_layers"],
        "feed_forward_length": shape["intermediate_size"], "attention.head_count": heads,
        "attention.head_count_kv": shape["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": shape["rope_theta"],
    }  # fmt: skip
    if num_experts:
        numbers |= {"expert_count": num_experts, "expert_used_count": 2}
    metadata = {"general.architecture": name, **{f"{name}.{key}": value for key, value in numbers.items()}}
    header = gguf_bytes.gguf_bytes(metadata, tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + at)
    return ModelFiles("sparse", None, "gguf", path)


def _unused() -> _Tensor:
    return _Tensor(_UNUSED_NAME, "F32", [HOLE_BYTES // 4])


def _write_safetensors(path: Path, tensors: Sequence[_Tensor]) -> None:
    entries, at = {}, 0
    for tensor in tensors:
        offsets = [at, at + tensor.num_bytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        at += tensor.num_bytes
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors:
            if tensor.data is not None:
                file.write(tensor.data)
            else:
                file.seek(tensor.num_bytes, 1)
        file.truncate(8 + len(header) + at)


def _stretch_gguf(small: Path, large: Path) -> None:
    """Move the second half of the tensors, their offsets and their bytes, past a hole."""
    copy = large.with_suffix(".header")
    shutil.copy(small, copy)
    reader = gguf.GGUFReader(copy, "r+")  # its fields are views of the mapped copy
    tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    moved = tensors[len(tensors) // 2 :]
    start = int(moved[0].data_offset)
    for tensor in moved:
        tensor.field.parts[-1][0] += HOLE_BYTES
    reader.data.flush()
    data = copy.read_bytes()
    copy.unlink()
    with large.open("wb") as file:
        file.write(data[:start])
        file.seek(HOLE_BYTES, 1)
        file.write(data[start:])
