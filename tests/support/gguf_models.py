"""Whole small models of random blocks: a GGUF file and the float32 results of `transformers`.

made = make(LLAMA, folder, {"*embed*": "Q6_K", "*": "Q4_K"})
job = score(made.case, made.files, made.reference, "float32")     # tests/support/family_scores.py
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers

from tests.support.family_case import BASE, FamilyCase
from tests.support.family_files import Reference
from tests.support.gguf_blocks import GgufMatrix, random_matrix
from tests.support.gguf_bytes import Tensor, gguf_bytes, write
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles

NUM_PROMPT_TOKENS, NUM_TOKENS = 200, 4
_CONFIG: dict[str, Any] = {**BASE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
LLAMA = FamilyCase("llama", "LlamaForCausalLM", _CONFIG, ())
QWEN2 = FamilyCase(
    "qwen2", "Qwen2ForCausalLM", _CONFIG, ()
)  # with q, k and v biases, and without reordered rows
QWEN3_MOE = FamilyCase(
    "qwen3moe",
    "Qwen3MoeForCausalLM",
    {
        **_CONFIG, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True,
    },
    (),
)  # fmt: skip
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
}


_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}


@dataclass(frozen=True, slots=True)
class MadeModel:
    """A file and its reference results."""

    case: FamilyCase
    files: ModelFiles
    reference: Reference
    digest: str  # of the file


def make(case: FamilyCase, folder: Path, formats: Mapping[str, str]) -> MadeModel:
    """Write a model; `formats` maps name patterns to matrix formats, and the first match wins."""
    model = _empty_model(case)
    random = np.random.default_rng(1)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[case.name], case.config["num_hidden_layers"])
    tensors: list[Tensor] = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:
                values = _add_experts(tensors, name, formats, parameter, random)
                parameter.copy_(torch.from_numpy(values))
                continue
            stored = str(names.get_name(name, (".weight", ".bias")))
            if parameter.dim() == 1:
                values = _random_vector(name, len(parameter), random)
                tensors.append(Tensor(stored, values.shape, 0, values.tobytes()))
            else:
                matrix = _random_matrix(name, format_of(formats, name), parameter.shape, random)
                values, dims = matrix.values, tuple(parameter.shape)[::-1]
                tensors.append(Tensor(stored, dims, matrix.ggml_type, matrix.data.tobytes()))
                if case.name == "llama" and (".q_proj." in name or ".k_proj." in name):
                    values = _joined_halves(values, model.config.head_dim)
            parameter.copy_(torch.from_numpy(values))
    data = gguf_bytes(_metadata(case), tensors)
    path = write(folder / f"{case.name}.gguf", data)
    files = ModelFiles(case.name, None, "gguf", path)
    return MadeModel(case, files, _reference(model), hashlib.sha256(data).hexdigest()[:16])


def changed(made: MadeModel, folder: Path, changes: Mapping[str, Any]) -> ModelFiles:
    """Write a model again with other values of its architecture's keys, or without those that are None."""
    metadata = _metadata(made.case) | {f"{made.case.name}.{key}": value for key, value in changes.items()}
    with GgufFile.open(made.files.path) as file:
        tensors = [
            Tensor(name, info.shape[::-1], gguf.GGMLQuantizationType[info.type], file.raw(name).tobytes())
            for name, info in file.tensors.items()
        ]
    given = {key: value for key, value in metadata.items() if value is not None}
    path = write(folder / "changed.gguf", gguf_bytes(given, tensors))
    return ModelFiles(made.case.name, None, "gguf", path)


def _add_experts(
    tensors: list[Tensor],
    name: str,
    formats: Mapping[str, str],
    parameter: torch.Tensor,
    random: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Add all experts' gates and ups, or downs, as tensors of their own; return the values [experts, ..]."""
    count, rows, columns = parameter.shape
    kinds = ("gate", "up") if "gate_up" in name else ("down",)
    parts = []
    for kind in kinds:
        shape = torch.Size((count * rows // len(kinds), columns))
        matrix = _random_matrix(name, format_of(formats, name), shape, random)
        stored = f"blk.{name.split('.')[2]}.ffn_{kind}_exps.weight"
        dims = (columns, rows // len(kinds), count)
        tensors.append(Tensor(stored, dims, matrix.ggml_type, matrix.data.tobytes()))
        parts.append(matrix.values.reshape(count, -1, columns))
    return np.concatenate(parts, axis=1)


def format_of(formats: Mapping[str, str], name: str) -> str:
    """Return the format of the first pattern that matches a name."""
    return next(format for pattern, format in formats.items() if fnmatch.fnmatchcase(name, pattern))


def _random_vector(name: str, size: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Make a norm's weight or a bias that affects the results."""
    is_norm = "norm" in name
    values = random.standard_normal(size) * (0.1 if is_norm else 0.3) + is_norm
    return values.astype(np.float32)


def _random_matrix(name: str, format: str, shape: torch.Size, random: np.random.Generator) -> GgufMatrix:
    """Make weights that preserve the scale of their inputs, or double it in the head to spread the logits."""
    rows, columns = shape
    deviation = 1.0 if "embed" in name else columns**-0.5 * (2 if "lm_head" in name else 1)
    return random_matrix(format, rows, columns, deviation, random)


def _joined_halves(rows: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Undo the row order of queries and keys that llama.cpp's converter applies (`permute`)."""
    heads = len(rows) // head_dim
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _empty_model(case: FamilyCase) -> transformers.PreTrainedModel:
    kind = getattr(transformers, case.architecture)
    config = kind.config_class(**case.config)
    config._attn_implementation = "eager"
    model: transformers.PreTrainedModel = kind(config).eval()
    return model


def _reference(model: transformers.PreTrainedModel) -> Reference:
    ids = np.random.default_rng(2).integers(3, model.config.vocab_size, NUM_PROMPT_TOKENS).tolist()
    for _ in range(NUM_TOKENS + 1):  # recomputed for each token, so that no cache can be wrong
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        ids.append(int(logits[-1].argmax()))
    prompt, answer = ids[:NUM_PROMPT_TOKENS], ids[NUM_PROMPT_TOKENS:-1]
    return Reference(prompt, answer, logits.double().log_softmax(-1).float().numpy())


def _metadata(case: FamilyCase) -> dict[str, Any]:
    """Return the header of a file with a tokenizer of 256 bytes and one merge; the rest is padding."""
    config, prefix = case.config, case.name
    tokens = ["<s>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th"]
    num_padding = config["vocab_size"] - len(tokens)
    of_experts = {
        f"{prefix}.{key}": config[name] for key, name in _EXPERT_KEYS.items() if "num_experts" in config
    }
    kinds = [3, 3, *itertools.repeat(1, len(tokens) - 2), *itertools.repeat(5, num_padding)]
    return of_experts | {
        "general.architecture": prefix,
        f"{prefix}.vocab_size": config["vocab_size"],
        f"{prefix}.context_length": config["max_position_embeddings"],
        f"{prefix}.embedding_length": config["hidden_size"],
        f"{prefix}.block_count": config["num_hidden_layers"],
        f"{prefix}.feed_forward_length": config["intermediate_size"],
        f"{prefix}.attention.head_count": config["num_attention_heads"],
        f"{prefix}.attention.head_count_kv": config["num_key_value_heads"],
        f"{prefix}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{prefix}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{index}]" for index in range(num_padding)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
