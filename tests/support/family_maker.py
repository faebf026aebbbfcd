"""Make tiny random models with `transformers`, plant faults in them, and compute their reference outputs.

The weights make a wrong model visible: matrices preserve the scale of their inputs, norm weights are not
ones, biases are not zeros, and the logits are far from flat. `family_files` calls this module and stores the
results.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tests.support.family_case import NUM_BEST, FamilyCase, Fault, overlaid

NUM_TOKENS = 16  # number of generated tokens
_MIN_CONFIDENCE = -3.5  # mean log-probability of the likeliest token
_MIN_MARGIN = 0.02  # between the two likeliest at each generated token, so that rounding cannot swap them
_SPECIAL_TOKENS = ("<s>", "</s>", "<|endoftext|>")
_BLOCK = 32  # weights that share a scale in Q8_0
_ROUTERS = (
    "mlp.gate.weight",
    "router.weight",
    "router.proj.weight",
    "gate.wg.weight",
    "feed_forward.gate.weight",
)
_BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")
_FACTORS = ("layer_scalar", "router.scale", "per_expert_scale")
_CLEAR = 4.0  # factor on router weights, so that few choices are near ties


def make(case: FamilyCase, folder: Path) -> dict[str, np.ndarray]:
    """Write the checkpoint of a case and return the arrays of its `Reference`."""
    model = _make_model(case)
    dtype = getattr(torch, case.dtype)
    model.to(dtype).save_pretrained(folder, save_original_format=not case.is_fused)
    _edit_config(folder, case.json, case.drops)
    save_tokenizer(folder)
    model = _open(folder, case.attention)
    for seed in range(100):
        prompt_ids = _random_ids(case, seed)
        token_ids = _greedy_ids(model, prompt_ids)
        found = _logprobs(model, prompt_ids + token_ids)
        best, second = np.sort(found)[len(prompt_ids) - 1 : -1, :-3:-1].T
        if (best - second).min() > _MIN_MARGIN:
            break
    else:
        raise AssertionError(f"{case.name}: no prompt whose answer is clear")
    confidence = found.max(axis=1).mean()
    assert confidence > _MIN_CONFIDENCE, f"{case.name}: the likeliest token has only {confidence:.2f}"
    ids = prompt_ids + token_ids
    rounding = _rounding(_logprobs(model.bfloat16(), ids), found, ids)
    return {
        "prompt_ids": np.array(prompt_ids),
        "token_ids": np.array(token_ids),
        "logprobs": found,
        "rounding": rounding,
    }


def logprobs(case: FamilyCase, folder: Path, ids: list[int]) -> np.ndarray:
    """Return the log-probabilities [n_tokens, vocab] float32 of a case's model after each token."""
    return _logprobs(_open(folder, case.attention), ids)


def _rounding(rounded: np.ndarray, exact: np.ndarray, ids: list[int]) -> np.ndarray:
    """Return each position's largest difference, over the best tokens and the one that follows."""
    best = np.argsort(rounded)[:-1, -NUM_BEST:]
    compared = np.concatenate([best, np.array(ids[1:])[:, None]], axis=1)
    apart: np.ndarray = np.take_along_axis(np.abs(rounded - exact)[:-1], compared, axis=1)
    worst: np.ndarray = apart.max(axis=1)
    return worst


def plant(fault: Fault, folder: Path) -> None:
    """Apply a fault to a checkpoint."""
    _edit_config(folder, fault.config, ())
    if not fault.tensors:
        return
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    names = fnmatch.filter(tensors, fault.tensors)
    assert names, f"no tensor is called {fault.tensors}"
    for name in names:
        tensor = tensors[name]
        tensors[name] = {
            "to ones": torch.ones_like(tensor),
            "to zeros": torch.zeros_like(tensor),
            "swap halves": tensor.roll(tensor.shape[0] // 2, 0),
        }[fault.change]
    path.unlink()  # it may be mapped
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def _make_model(case: FamilyCase) -> transformers.PreTrainedModel:
    cls = getattr(transformers, case.architecture)
    torch.manual_seed(1)
    config = cls.config_class(**copy.deepcopy(dict(case.config)))  # the class keeps and modifies them
    model: transformers.PreTrainedModel = cls(config).eval()
    make_matrix = _random_matrix if set(case.gguf) <= {"f32"} else _random_codes
    embeddings, transposed = (
        {id(module.weight) for module in model.modules() if isinstance(module, kind)}
        for kind in (torch.nn.Embedding, Conv1D)
    )
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *_buffers(model)]:
            shape = parameter.shape[::-1] if id(parameter) in transposed else parameter.shape
            if name.endswith("sinks"):  # large enough to change the attention output
                parameter.normal_(1.0, 1.0)
            elif name.endswith("_bias"):  # biases of experts and of their selection
                parameter.normal_(0.0, 0.3)
            elif name.endswith(_FACTORS):
                parameter.normal_(1.0, 0.2)
            elif name.endswith(_ROUTERS):
                parameter.copy_(make_matrix(shape, shape[-1]) * _CLEAR)
            elif parameter.dim() == 1:
                is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
                parameter.normal_(1.0 if is_norm else 0.0, 0.1)
            else:
                made = make_matrix(shape, 1.0 if id(parameter) in embeddings else shape[-1])
                parameter.copy_(made.T if id(parameter) in transposed else made)
        head = model.get_output_embeddings().weight
        if case.config["tie_word_embeddings"]:
            head *= 2.0**-4  # the embedding must not outweigh what the layers add to it
        ids = _random_ids(case, 0)
        while model(torch.tensor([ids])).logits[0].log_softmax(-1).amax(-1).mean() < _MIN_CONFIDENCE + 1:
            head *= 2
    return model


def _buffers(model: transformers.PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Return the tensors that files have although they are not parameters of the model."""
    return [(name, each) for name, each in model.named_buffers() if name.endswith(_BUFFERS)]


def _random_matrix(shape: torch.Size, variance: float) -> Tensor:
    """Return noise divided by the square root of `variance`."""
    noise: Tensor = torch.randn(shape) / variance**0.5
    return noise


def _random_codes(shape: torch.Size, variance: float) -> Tensor:
    """Return noise of about that size that float16, bfloat16 and Q8_0 represent exactly.

    The values are small integers times a power of two. Each Q8_0 block contains a 127, the largest code, so
    that its scale is that power.
    """
    codes = (torch.randn(shape) * 40).round().clamp(-127, 127)
    for start in range(0, shape[-1], _BLOCK):
        block = codes[..., start : start + _BLOCK]
        largest = torch.randint(block.shape[-1], (*shape[:-1], 1))
        block.scatter_(-1, largest, 127.0)
    scale: float = 2.0 ** round(-math.log2(45 * variance**0.5))
    return codes * scale


def _random_ids(case: FamilyCase, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(
        len(_SPECIAL_TOKENS), case.config["vocab_size"], (case.prompt_length,), generator=generator
    ).tolist()
    return ids


def _edit_config(folder: Path, changes: Mapping[str, Any], drops: tuple[str, ...]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    kept = {key: value for key, value in config.items() if key not in drops}
    path.write_text(json.dumps(overlaid(kept, changes), indent=2), encoding="utf-8")


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of special tokens, the 256 bytes and one merge, which splits text like GPT-2's."""
    tokens = [*_SPECIAL_TOKENS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th"]
    vocab = {text: index for index, text in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "h")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL_TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _open(folder: Path, attention: str) -> transformers.PreTrainedModel:
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    model: transformers.PreTrainedModel = opened[0].eval()
    assert not any(opened[1].values()), f"{folder} is not all of the model: {opened[1]}"
    return model


def _greedy_ids(model: transformers.PreTrainedModel, prompt_ids: list[int]) -> list[int]:
    """Compute everything again for each token, so that no cache can be wrong."""
    ids = list(prompt_ids)
    for _ in range(NUM_TOKENS):
        ids.append(int(_logprobs(model, ids)[-1].argmax()))
    return ids[len(prompt_ids) :]


def _logprobs(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.tensor([ids])).logits[0].double().log_softmax(-1).float().numpy()
    return found
