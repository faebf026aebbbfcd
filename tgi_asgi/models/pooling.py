"""Reads how a checkpoint pools, from the files of sentence-transformers or a GGUF file's key.

Read once, by `runner/load_pooling.py`. Something unsupported yields a reason, not an error, because the model
may still generate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import read_optional_json
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.safetensors import SafetensorsFile
from tgi_asgi.models.loading.gguf_tensors import GgufTensors
from tgi_asgi.models.loading.tensors import read_floats
from tgi_asgi.ops import decode
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.text.tokenizer_files import read_sentence_config
from tgi_asgi.types import PoolingKind

logger = logging.getLogger(__name__)

ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, np.float32(0)),
    "Sigmoid": lambda x: np.float32(1) / (np.float32(1) + np.exp(-x)),
}
# By llama.cpp's numbers; 0: none, 4: a rank.
_GGUF_KINDS = {1: PoolingKind.MEAN, 2: PoolingKind.CLS, 3: PoolingKind.LAST}
_GGUF_DENSE = ("dense_2.weight", "dense_3.weight")
# The names of `pooling_mode` in `1_Pooling/config.json`; before version 5.4, each had a flag.
_MODES = {
    "cls": PoolingKind.CLS,
    "mean": PoolingKind.MEAN,
    "max": PoolingKind.MAX,
    "mean_sqrt_len_tokens": PoolingKind.MEAN_SQRT_LEN,
    "weightedmean": PoolingKind.WEIGHTED_MEAN,
    "lasttoken": PoolingKind.LAST,
}
_MODE_OF_FLAG = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Keys of `sentence_bert_config.json`; "args" is their name before version 5.4.
_TOKENIZER_OPTIONS = ("processor_kwargs", "tokenizer_args")
_READ = ("model_max_length", "padding_side", "trust_remote_code")  # in these; texts need no padding


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A linear layer after the pooling."""

    weight: Floats  # [out, in]
    bias: Floats | None  # [out]
    activation: str  # one of `ACTIVATIONS`
    residual: Floats | None = None  # [out, in], of what is added to the output

    def apply(self, x: Floats) -> Floats:
        """Return the layer's output for x [in]."""
        out = self.weight @ x
        if self.bias is not None:
            out = out + self.bias
        out = ACTIVATIONS[self.activation](out)
        return out if self.residual is None else out + self.residual @ x


@dataclass(frozen=True, slots=True)
class PoolingFiles:
    """The pooling settings in the files.

    Attributes:
        kind: None: not specified, or unsupported for a `reason`.
        max_tokens: Maximum number of tokens in a text.
        score_tokens: Tokens whose logits score a pair: "yes", or "no" and "yes".
        is_specified: Whether the files are those of an embedding or ranking model, which does not generate.
    """

    kind: PoolingKind | None = None
    reason: str = ""
    dense: tuple[Dense, ...] = ()
    is_normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int | None = None
    score_tokens: tuple[int, ...] = ()

    @property
    def is_specified(self) -> bool:
        return self.kind is not None or bool(self.score_tokens)


def read_gguf_pooling(file: GgufFile) -> PoolingFiles:
    """Read the pooling of a GGUF file, and the linear layers that EmbeddingGemma's may have after it.

    Raises:
        ModelLoadError: if one of these is damaged.
    """
    kind = file.metadata.get(f"{file.metadata.get('general.architecture')}.pooling_type")
    dense = [Dense(_matrix_of(file, name), None, "Identity") for name in _GGUF_DENSE if name in file.tensors]
    return PoolingFiles(_GGUF_KINDS.get(kind) if type(kind) is int else None, dense=tuple(dense))


def _matrix_of(file: GgufFile, name: str) -> Floats:
    info = file.tensor(name)
    if len(info.shape) != 2:
        raise ModelLoadError(f"tensor {name!r} must be a matrix, got the shape {list(info.shape)}")
    return decode(GgufTensors(file).matrix(name))


def read_pooling(directory: Path) -> PoolingFiles:
    """Read the files of sentence-transformers, if there are any.

    Raises:
        ModelLoadError: if one of them is damaged.
    """
    modules = _read_list(directory / "modules.json")
    found = read_sentence_config(directory)
    about = read_optional_json(directory / "config_sentence_transformers.json")
    longest = _longest(found)
    if longest is None and modules:
        longest = read_optional_json(directory / "tokenizer_config.json").get("model_max_length")
    if modules:
        _warn_of_unread(found, about)
    result: dict[str, Any] = {
        "max_tokens": longest if type(longest) is int and longest > 0 else None,
        "prompts": _prompts(about),
        "is_normalized": not modules,
    }
    dense: list[Dense] = []
    try:
        for kind, path in modules:
            match kind:
                case "Transformer":
                    pass
                case "Pooling":
                    config = read_optional_json(path / "config.json")
                    result["kind"] = _pooling_kind(config)
                    if config.get("include_prompt") is False:
                        result["prompts"] = {}  # their tokens would have to be excluded from the pooling
                case "Dense":
                    if "kind" not in result or result["is_normalized"]:
                        raise _Unsupported("a Dense of modules.json is not between Pooling and Normalize")
                    dense.append(_read_dense(path))
                case "Normalize":
                    _check_names(path, read_optional_json(path / "config.json"))
                    result["is_normalized"] = True
                case "LogitScore":
                    result["score_tokens"] = _score_tokens(read_optional_json(path / "config.json"))
                case _:
                    raise _Unsupported(f"the module {kind[:100]} of modules.json is not known")
    except _Unsupported as error:
        return PoolingFiles(reason=str(error))
    return PoolingFiles(dense=tuple(dense), **result)


def _longest(sentence_config: Mapping[str, Any]) -> Any:
    """Return the length at which sentence-transformers cuts texts, as the file has it; None: not there."""
    longest = sentence_config.get("max_seq_length")
    for name in _TOKENIZER_OPTIONS:
        if isinstance(options := sentence_config.get(name), dict):
            longest = options.get("model_max_length", longest)
    return longest


def _prompts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that may precede a text, by the names of their tasks."""
    prompts = config.get("prompts")
    named = prompts.items() if isinstance(prompts, dict) else ()
    return {name: text for name, text in named if isinstance(text, str)}


def _warn_of_unread(found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Log what sentence-transformers would do by itself, and this server does not."""
    for name in ("processing_kwargs", "config_kwargs", "config_args", *_TOKENIZER_OPTIONS):
        asked = found.get(name)
        if isinstance(asked, dict):
            asked = {key: value for key, value in asked.items() if key not in _READ}
        if asked:
            logger.warning("%s of sentence_bert_config.json is not followed: %.200r", name, asked)
    if (prompt := about.get("default_prompt_name")) is not None:
        logger.warning("the prompt %.100r is put before a text only if a request names it", prompt)
    if (dimensions := about.get("truncate_dim")) is not None:
        logger.warning("vectors are cut to %.100r dimensions only if a request says so", dimensions)


class _Unsupported(Exception):
    """Raised for what sentence-transformers supports and this server does not."""


def _read_list(path: Path) -> list[tuple[str, Path]]:
    """Return the modules' kinds and folders, in order."""
    if not path.is_file():
        return []
    import json

    try:
        entries = json.loads(path.read_bytes())
        return [
            (str(entry["type"]).rpartition(".")[2], _inside(path.parent, str(entry["path"])))
            for entry in sorted(entries, key=lambda entry: int(entry["idx"]))
        ]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelLoadError(f"{path} is damaged: {error!r}") from None


def _inside(directory: Path, name: str) -> Path:
    path = (directory / name).absolute()
    if ".." in Path(name).parts or not path.is_relative_to(directory.absolute()):
        raise ModelLoadError(f"{directory}/modules.json names a folder outside: {name[:100]!r}")
    return path


def _pooling_kind(config: Mapping[str, Any]) -> PoolingKind:
    """Return what a Pooling's configuration says; like sentence-transformers, the mean if it says nothing."""
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    named = config.get("pooling_mode", [_MODE_OF_FLAG.get(flag, flag) for flag in flags] or "mean")
    names = named if isinstance(named, list) else [named]
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in _MODES:
        raise _Unsupported(f"the pooling {str(named)[:100]} is not known")
    return _MODES[names[0]]


def _read_dense(path: Path) -> Dense:
    config = read_optional_json(path / "config.json")
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise _Unsupported(f"the activation {activation[:100]} of {path.name} is not known")
    if not (path / "model.safetensors").is_file():
        raise _Unsupported(f"{path.name} has no model.safetensors (pickled weights are never read)")
    _check_names(path, config)
    file = SafetensorsFile.open(path / "model.safetensors")
    try:
        weight, bias = _read_linear(file)
        residual = _read_residual(file, weight) if config.get("use_residual") else None
    except ModelLoadError as error:
        raise ModelLoadError(f"{file.path}: {error}") from None
    finally:
        file.close()
    return Dense(weight, bias, activation, residual)


def _check_names(path: Path, config: Mapping[str, Any]) -> None:
    names = {config.get(f"module_{side}_name") for side in ("input", "output")}
    if names - {None, "sentence_embedding"}:
        raise _Unsupported(f"{path.name} reads or writes other than the sentence's embedding")


def _read_linear(file: SafetensorsFile) -> tuple[Floats, Floats | None]:
    """Return the matrix of a layer, and its bias if it has one."""
    weight = read_floats(file, "linear.weight")
    bias = read_floats(file, "linear.bias") if "linear.bias" in file.tensors else None
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ModelLoadError("`linear` must be a matrix, and a bias of its rows")
    return weight, bias


def _read_residual(file: SafetensorsFile, weight: Floats) -> Floats:
    """Return the matrix of what a layer adds of its input: the file's own, or 1 if the sizes are equal."""
    rows, columns = weight.shape
    residual = np.eye(rows, dtype=np.float32) if rows == columns else read_floats(file, "residual.weight")
    if residual.shape != weight.shape:
        raise ModelLoadError("`residual` must be of the shape of `linear`")
    return residual


def _score_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids of "no", if given, and of "yes"."""
    no, yes = config.get("false_token_id"), config.get("true_token_id")
    given = (yes,) if no is None else (no, yes)
    ids = tuple(token_id for token_id in given if type(token_id) is int and token_id >= 0)
    if len(ids) < len(given):
        raise _Unsupported(f"the tokens {str(given)[:100]} of LogitScore are not token ids")
    return ids
