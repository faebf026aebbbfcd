"""GGUF files of newer models, most with routed experts, for speed measurements: real layers, random weights.

    python -m bench.moe_files qwen3-30b-a3b model.gguf --layers 8

The formats are those that llama.cpp assigns to each tensor (Q4_K_M; gpt-oss as it is published). The
vocabulary is cut in proportion to the layers, so that the head has the same share of a step as in the whole
model. All experts of a tensor hold the same random blocks: the time of a product does not depend on the
values.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from bench.hybrid_files import HYBRIDS, DeltaModel, LatentModel, Shape, Tensors
from tests.support.gguf_blocks import Bytes, random_matrix

EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@dataclass(frozen=True, slots=True)
class MoeModel:
    """A published model's sizes.

    Attributes:
        name: llama.cpp's name of the architecture.
        num_layers, vocab_size: Sizes of the whole model.
        matrices, head: Formats; `more`: format of values and of experts' down projections in layers that get
            more bits.
        metadata: The architecture's metadata other than sizes.
        qk_norm: Whether queries and keys are normalised as a whole or per head; None: not at all.
        mlp_norm: Name of the norm before the experts.
    """

    name: str
    num_layers: int
    vocab_size: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    size: int  # of an expert
    matrices: str
    experts: str
    head: str
    more: str
    metadata: dict[str, Any]
    qk_norm: Literal["whole", "head"] | None = None
    mlp_norm: str = "ffn_norm"
    has_biases: bool = False
    has_sinks: bool = False

    def ends(self, vocab_size: int) -> Tensors:
        """Return format and shape of the tensors before and after the layers."""
        vocabulary = (vocab_size, self.hidden)
        return {
            "token_embd.weight": (self.matrices, vocabulary),
            "output_norm.weight": ("F32", (self.hidden,)),
            "output.weight": (self.head, vocabulary),
        }

    def layer(self, index: int, *, has_more: bool) -> Tensors:
        """Return format and shape of a layer's tensors; `has_more`: the layer gets more bits."""
        return {
            name: (self._format(name, shape, has_more=has_more), shape)
            for name, shape in self._shapes().items()
        }

    def _shapes(self) -> dict[str, Shape]:
        hidden, count, size = self.hidden, self.num_experts, self.size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        products = {
            "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
            "attn_output": (hidden, queries), "ffn_gate_inp": (count, hidden),
            "ffn_gate_exps": (count, size, hidden), "ffn_up_exps": (count, size, hidden),
            "ffn_down_exps": (count, hidden, size),
        }  # fmt: skip
        shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in products.items()}
        if self.has_biases:
            shapes |= {f"{name}.bias": shape[:-1] for name, shape in products.items()}
        if self.qk_norm is not None:
            whole = self.qk_norm == "whole"
            shapes["attn_q_norm.weight"] = (queries if whole else self.head_dim,)
            shapes["attn_k_norm.weight"] = (keys if whole else self.head_dim,)
        if self.has_sinks:
            shapes["attn_sinks.weight"] = (self.num_heads,)
        return {"attn_norm.weight": (hidden,), f"{self.mlp_norm}.weight": (hidden,), **shapes}

    def _format(self, name: str, shape: Shape, *, has_more: bool) -> str:
        stem = name.removesuffix(".weight")
        if len(shape) == 1 or name.endswith(".bias") or stem == "ffn_gate_inp":
            return "F32"
        if has_more and stem in ("attn_v", "ffn_down_exps"):
            return self.more
        return self.experts if stem in EXPERTS else self.matrices

    def numbers(self) -> dict[str, Any]:
        """Return the model's sizes for the file's metadata."""
        numbers = {
            "feed_forward_length": self.size, "expert_count": self.num_experts,
            "expert_used_count": self.top_k,
            "attention.head_count": self.num_heads, "attention.head_count_kv": self.num_kv_heads,
            "attention.key_length": self.head_dim, "attention.value_length": self.head_dim, **self.metadata,
        }  # fmt: skip
        if self.name != "olmoe":  # its only MLP size is that of the experts
            numbers["expert_feed_forward_length"] = self.size
        return numbers


Model = MoeModel | DeltaModel | LatentModel


def cut_vocabulary(model: Model, num_layers: int) -> int:
    """Return the vocabulary size of a file with this many layers: a multiple of 64."""
    return -(-model.vocab_size * num_layers // model.num_layers // 64) * 64


def _tensors(model: Model, num_layers: int) -> Tensors:
    """Return format and shape of each tensor of a file with this many layers, by name."""
    found = model.ends(cut_vocabulary(model, num_layers))
    for index in range(num_layers):
        of_layer = model.layer(index, has_more=is_more(index, num_layers))
        found |= {f"blk.{index}.{name}": each for name, each in of_layer.items()}
    return found


def _header(model: Model, num_layers: int) -> dict[str, Any]:
    """Return a file's metadata."""
    numbers = {
        "context_length": 32768, "embedding_length": model.hidden, "block_count": num_layers,
        "vocab_size": cut_vocabulary(model, num_layers), **model.numbers(),
    }  # fmt: skip
    return {f"{model.name}.{key}": value for key, value in numbers.items()}


def is_more(index: int, num_layers: int) -> bool:
    """Return whether llama.cpp's Q4_K_M gives a layer's values and downs six bits (`use_more_bits`)."""
    eighth = num_layers // 8
    return index < eighth or index >= 7 * num_layers // 8 or (index - eighth) % 3 == 2


_K_QUANTS: dict[str, Any] = {"matrices": "Q4_K", "experts": "Q4_K", "head": "Q6_K", "more": "Q6_K"}
_PUBLISHED: dict[str, Any] = {"matrices": "Q8_0", "experts": "MXFP4", "head": "Q8_0", "more": "MXFP4"}
MODELS: dict[str, Model] = {
    **HYBRIDS,
    "olmoe-1b-7b": MoeModel(
        "olmoe", 16, 50304, 2048, 16, 16, 128, 64, 8, 1024, **_K_QUANTS, qk_norm="whole",
        metadata={"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0},
    ),
    "qwen3-30b-a3b": MoeModel(
        "qwen3moe", 48, 151936, 2048, 32, 4, 128, 128, 8, 768, **_K_QUANTS, qk_norm="head",
        metadata={"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6},
    ),
    "gpt-oss-20b": MoeModel(
        "gpt-oss", 24, 201088, 2880, 64, 8, 64, 32, 4, 2880, **_PUBLISHED, mlp_norm="post_attention_norm",
        has_biases=True, has_sinks=True,
        metadata={
            "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 150000.0,
            "attention.sliding_window": 128, "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
    ),
}  # fmt: skip


def make(path: Path, model: Model, num_layers: int) -> None:
    """Write a file with this many layers, holding one tensor at a time in memory."""
    tensors, random = _tensors(model, num_layers), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, model.name)
    for key, value in _header(model, num_layers).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, _TYPES[type(value)])
    _add_tokenizer(writer, cut_vocabulary(model, num_layers))
    for name, (format, shape) in tensors.items():
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
        size = math.prod(shape) // block * nbytes
        stored = (*shape[:-1], shape[-1] // block * nbytes) if format != "F32" else shape
        dtype = np.dtype(np.float32 if format == "F32" else np.uint8)
        writer.add_tensor_info(name, stored, dtype, size, gguf.GGMLQuantizationType[format])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    kept: dict[tuple[str, Shape], Bytes] = {}
    for name, (format, shape) in tensors.items():
        matrix = shape[-2:]
        if len(shape) == 1 or "conv1d" in name:
            values = random.standard_normal(shape) * 0.1 + ("norm" in name)
            if name.endswith("ssm_a"):  # a state decays
                values = -np.abs(values)
            writer.write_tensor_data(values.astype(np.float32))
            continue
        if (format, matrix) not in kept:
            kept[format, matrix] = random_matrix(format, shape[-2], shape[-1], shape[-1] ** -0.5, random).data
        data = kept[format, matrix]
        if "gate_inp" in name or name.endswith(".bias"):  # each layer selects different experts
            values = random.standard_normal(shape) * (0.1 if name.endswith(".bias") else 1.0)
            data = values.astype(np.float32).view(np.uint8)
        writer.write_tensor_data(np.broadcast_to(data, (*shape[:-2], *data.shape[-2:])))
    writer.close()


_TYPES = {
    str: gguf.GGUFValueType.STRING,
    float: gguf.GGUFValueType.FLOAT32,
    int: gguf.GGUFValueType.UINT32,
    bool: gguf.GGUFValueType.BOOL,
}


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Add a tokenizer of 256 bytes; the rest of the vocabulary is padding."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "th"]
    kinds = [3, 3, *[1] * (len(tokens) - 2), *[5] * (vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[PAD{index}]" for index in range(vocab_size - len(tokens))])
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    make(options.path, MODELS[options.name], options.layers)


if __name__ == "__main__":
    main()
