"""Tiny checkpoints of embedders and rerankers, as sentence-transformers and transformers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import tokenizers
import torch
import transformers

from tests.support.checkpoints import SHAPE, Model, make_model, save, save_tokenizer
from tgi_asgi.formats.sources import ModelFiles

EOS = 5  # the token that the tokenizer appends to a text, as Qwen3-Embedding's does
_MODULES = "sentence_transformers.models."
Vector = npt.NDArray[np.float32]
# The vectors in `oracle/sentence-transformers.json`: the pooling mode and the modules that follow it.
TEXTS, QUERIES = ("short", "a-much-longer-text-" * 8, "x"), ("what-is-it", "y")
RECORDED: dict[str, tuple[str, ...]] = {
    "lasttoken": ("Normalize",),
    "mean_tokens": ("Dense", "Normalize"),
    "cls_token": (),
    "weightedmean_tokens": (),
    "mean_sqrt_len_tokens": (),
    "max_tokens": (),
}


def save_embedder(
    directory: Path,
    mode: str | None = "lasttoken",
    *,
    kind: str = "Qwen3",
    architecture: str | None = None,
    is_bare: bool = True,
    modules: tuple[str, ...] = ("Normalize",),
    prompts: dict[str, str] | None = None,
    max_length: int | None = None,
    **changes: Any,
) -> Model:
    """Write a model with its tokenizer and sentence-transformers' files; return it.

    Args:
        mode: Pooling mode, as in `pooling_mode_<mode>`; None writes no sentence-transformers files.
        is_bare: Whether to omit the head and the prefix `model.` of tensor names.
        modules: Modules after the pooling: "Normalize", "Dense".
    """
    model = make_model(kind, **changes)
    save(model, directory)
    if is_bare:
        state = {f"{name}": tensor.contiguous() for name, tensor in model.model.state_dict().items()}
        safetensors.torch.save_file(state, directory / "model.safetensors", {"format": "pt"})
    if architecture is not None:
        edit(directory / "config.json", architectures=[architecture])
    save_text_files(directory)
    if mode is None:
        return model
    names = ("Transformer", "Pooling", *modules)
    listed = [
        {"idx": at, "name": str(at), "path": f"{at}_{name}" if at else "", "type": _MODULES + name}
        for at, name in enumerate(names)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "1_Pooling").mkdir()
    flags = {"word_embedding_dimension": SHAPE["hidden_size"], f"pooling_mode_{mode}": True}
    (directory / "1_Pooling/config.json").write_text(json.dumps(flags))
    if "Dense" in modules:
        _save_dense(directory / f"{names.index('Dense')}_Dense")
    if prompts:
        (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    if max_length:
        (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))
    return model


def save_classifier(directory: Path, num_labels: int, **changes: Any) -> transformers.PreTrainedModel:
    """Write a Qwen 3 classifier; return it."""
    config = transformers.Qwen3Config(**{**SHAPE, "pad_token_id": 0, "num_labels": num_labels, **changes})
    torch.manual_seed(2)
    model: Model = transformers.Qwen3ForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if "norm" in name else 0.15)
    model.save_pretrained(directory)
    save_text_files(directory)
    return model


def save_text_files(directory: Path) -> None:
    """Write a tokenizer that appends `EOS` to each text."""
    save_tokenizer(directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = backend.id_to_token(EOS)
    backend.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(
                single=f"$A {text}", pair=f"$A $B:1 {text}:1", special_tokens=[(text, EOS)]
            ),
        ]
    )
    backend.save(str(directory / "tokenizer.json"))


def edit(path: Path, **values: Any) -> None:
    """Override values of a JSON file; None removes a key."""
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def states(model: Any, ids: list[int]) -> torch.Tensor:
    """Return transformers' hidden states [n_tokens, hidden] after the last norm."""
    with torch.inference_mode():
        hidden: torch.Tensor = getattr(model, "model", model)(torch.tensor([ids])).last_hidden_state[0]
    return hidden


def pooled(hidden: torch.Tensor, mode: str) -> torch.Tensor:
    """Pool hidden states as sentence-transformers does."""
    count = len(hidden)
    weights = torch.arange(1, count + 1, dtype=torch.float32)[:, None]
    found: dict[str, torch.Tensor] = {
        "lasttoken": hidden[-1],
        "cls_token": hidden[0],
        "mean_tokens": hidden.mean(0),
        "max_tokens": hidden.max(0).values,
        "mean_sqrt_len_tokens": hidden.sum(0) / count**0.5,
        "weightedmean_tokens": (hidden * weights).sum(0) / weights.sum(),
    }
    return found[mode]


def files_of(directory: Path) -> ModelFiles:
    """Return the `ModelFiles` of a directory, for `load`."""
    return ModelFiles("tiny", None, "directory", directory)


def _save_dense(directory: Path) -> None:
    directory.mkdir()
    torch.manual_seed(3)
    tensors = {"linear.weight": torch.randn(24, SHAPE["hidden_size"]) / 8, "linear.bias": torch.randn(24) / 8}
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    config = {
        "in_features": SHAPE["hidden_size"],
        "out_features": 24,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (directory / "config.json").write_text(json.dumps(config))


def dense(directory: Path, vector: torch.Tensor) -> torch.Tensor:
    """Return the output of a `Dense` module of `save_embedder` for a vector."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    return torch.tanh(tensors["linear.weight"] @ vector + tensors["linear.bias"])


def fix_weights(directory: Path) -> None:
    """Write weights that do not depend on any library's version, for recorded vectors."""
    for path in sorted(directory.rglob("model.safetensors")):
        tensors = safetensors.torch.load_file(path)
        generator = np.random.default_rng(5)
        for name in sorted(tensors):
            random = generator.standard_normal(tuple(tensors[name].shape)).astype(np.float32) * 0.15
            tensors[name] = torch.from_numpy(random + (1 if "norm" in name else 0))
        safetensors.torch.save_file(tensors, path, {"format": "pt"})


def save_recorded(name: str, directory: Path) -> None:
    """Write a checkpoint whose vectors are recorded."""
    save_embedder(directory, name, modules=RECORDED[name])
    fix_weights(directory)


def save_recorded_classifier(directory: Path) -> None:
    """Write the classifier whose scores are recorded."""
    save_classifier(directory, 1)
    fix_weights(directory)
