"""Read LoRA adapters in `peft`'s format: `adapter_config.json`, and the matrices in the safetensors file.

Options that would change the arithmetic and are not supported are refused by name, and so is every unknown
key of the configuration. Pickled adapters (`adapter_model.bin`) are never read. What is merged into its base
model (`models/loading/merged.py`) may do more than what is computed beside it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import map_file, parse_json_object, read_file
from tgi_asgi.formats.patterns import Patterns
from tgi_asgi.formats.safetensors import SafeTensor, SafetensorsFile, read_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # absent if saved by `transformers` with save_peft_format=False
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_DOWN, _EMBEDDING_UP = ".lora_embedding_A", ".lora_embedding_B"
# Ends of matrices' names, each with that of the other matrix of the module.
_OTHERS = {_DOWN: _UP, _UP: _DOWN}
_MERGED_OTHERS = {**_OTHERS, _EMBEDDING_DOWN: _EMBEDDING_UP, _EMBEDDING_UP: _EMBEDDING_DOWN}
_ROWS = ".token_adapter.trainable_tokens_delta"
_BASE = ".base_layer"
_MAGNITUDE = ".lora_magnitude_vector"  # older versions of `peft` append .weight
_DTYPES = ("F32", "F16", "BF16")
# Keys about training, or made redundant by the file's matrices, whose names say where they belong.
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
})  # fmt: skip
# Keys with their names in messages; refused unless absent, empty or false.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases (lora_bias)",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "embeddings of its own (trainable_token_indices)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "target_parameters": "parameters such as experts (target_parameters)",
    "megatron_config": "Megatron's layers (megatron_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_CURE = " beside a base (but as --model-id, merged into it)"
# Of these, what merging supports.
_MERGEABLE = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "bias")
_READ = frozenset({
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "use_rslora",
})  # fmt: skip
# Initialisations of the matrices that leave the base unchanged. With others (PiSSA, OLoRA, CorDA, LoftQ,
# ...), `peft` changes the base when it loads the adapter: `LoraLayer.update_layer`, 0.21. Adapters converted
# by `path_initial_model_for_weight_conversion` are saved as plain ones, with true.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal")
# Parts of the names of tensors other than the two matrices, with what they belong to.
_UNSUPPORTED_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding": "embeddings",
    "base_layer": "an embedding or the head",  # which peft saves beside what changes it
    "lora_B.bias": "biases (lora_bias)",
    "modules_to_save": "whole modules (modules_to_save)",
}
_MAX_CONFIG_BYTES = 4 << 20
_MAX_WEIGHT_BYTES = 1 << 30  # unless the caller knows its model's maximum
_MAX_MODULE_CHARS = 256  # searching a pattern takes time quadratic in this


@dataclass(frozen=True, slots=True)
class PeftTarget:
    """The two LoRA matrices of a module, and the factor for their product."""

    module: str  # the module's path in the base model
    down: SafeTensor  # [rank, columns]
    up: SafeTensor  # [rows, rank]
    scale: float
    magnitude: SafeTensor | None = None  # [rows], of DoRA

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def is_embedding(self) -> bool:
        """Whether the module's matrix is [columns, rows]: a row of an embedding is a token's."""
        return self.down.name.endswith(_EMBEDDING_DOWN)


@dataclass(frozen=True, slots=True)
class PeftRows:
    """Rows that replace those of some tokens in an embedding (`trainable_token_indices`)."""

    module: str
    token_ids: tuple[int, ...]
    rows: SafeTensor  # [n_tokens, columns]


class PeftAdapter:
    """An adapter's directory, read and checked; close it.

    Its files may be written while they are read. Each file is therefore read once, and those same bytes are
    checked, computed with and hashed. Of an adapter to be merged, the matrices are mapped, as a model's are.

    Attributes:
        targets: The modules that it changes.
        whole: Tensors that replace the base model's, by their names there; only if it is merged.
        rows: Rows of embeddings that replace the base model's; only if it is merged.
        digest: Digest of all its bytes; of its configuration alone if it is merged.
        num_bytes: Size of its matrices.
        base: The base model named in its configuration, or None.
        parameters: The ends of the paths of the parameters that it changes (`target_parameters`). The file
            does not say which of its targets are parameters; only the base does (`of_parameter`).
    """

    def __init__(
        self, directory: Path, max_bytes: int = _MAX_WEIGHT_BYTES, why: str = "", *, is_merged: bool = False
    ) -> None:
        """Read a directory.

        Args:
            max_bytes: Maximum size of the file of matrices.
            why: Text appended to the message if the file is larger.
            is_merged: Whether to read DoRA and whole modules, too, which only merging supports.

        Raises:
            ModelLoadError: if a file is missing, too large or damaged, or the adapter is of an unsupported
                kind.
        """
        where = directory / CONFIG_NAME
        text = read_file(where, _MAX_CONFIG_BYTES)
        try:
            config = parse_json_object(text.tobytes())
            _check_config(config, _MERGEABLE if is_merged else ())
            self._numbers = numbers = _Numbers(config)
        except ModelLoadError as error:
            raise ModelLoadError(f"{where}: {error}") from None
        base = config.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) else None
        self.parameters = numbers.parameters
        path = directory / WEIGHTS_NAME
        data = _map_weights(path) if is_merged else _read_weights(path, max_bytes, why, numbers)
        self._file = SafetensorsFile(path, data)
        try:
            parts = _split(self._file.tensors) if is_merged else _Parts(self._file.tensors, {}, {}, {})
            self.rows = [_rows(config, module, tensor) for module, tensor in parts.rows.items()]
            others = _MERGED_OTHERS if is_merged else _OTHERS
            self.targets = _targets(parts.matrices, parts.magnitudes, numbers, others)
            self.whole = parts.whole
            if not self.targets and not self.whole and not self.rows:
                raise ModelLoadError("it contains no matrices, so it changes nothing")
        except ModelLoadError as error:
            self._file.close()
            raise ModelLoadError(f"{path}: {error}") from None
        self.num_bytes = sum(target.down.nbytes + target.up.nbytes for target in self.targets)
        hasher = hashlib.blake2b(text.data, digest_size=16)
        if not is_merged:
            hasher.update(data.data)
        self.digest = hasher.digest()

    def raw(self, tensor: SafeTensor) -> Any:
        """Return a matrix's bytes, as `SafetensorsFile.raw`."""
        return self._file.raw(tensor.name)

    def of_parameter(self, target: PeftTarget, path: str, num_matrices: int) -> PeftTarget:
        """Return a target with a parameter's path and scale, whose matrices are those of many side by side.

        Raises:
            ModelLoadError: if it has another rank than the configuration says.
        """
        _check_rank(target.down, self._numbers.rank(path) * num_matrices)
        return replace(target, module=path, scale=self._numbers.scale(path))

    def close(self) -> None:
        """Release the bytes; arrays that `raw` has returned stay valid."""
        self._file.close()


def _map_weights(path: Path) -> npt.NDArray[np.uint8]:
    _refuse_pickle(path)
    return map_file(path)


def _read_weights(path: Path, max_bytes: int, why: str, numbers: _Numbers) -> npt.NDArray[np.uint8]:
    _refuse_pickle(path)
    try:
        return read_file(path, max_bytes, why)
    except ModelLoadError:
        if path.is_file() and path.stat().st_size > max_bytes:
            _check_names(path, numbers)
        raise


def _refuse_pickle(path: Path) -> None:
    if os.path.exists(path.with_suffix(".bin")) and not os.path.exists(path):
        raise ModelLoadError(f"{path.parent}: pickled adapters are never read, save {WEIGHTS_NAME}")


def _check_names(path: Path, numbers: _Numbers) -> None:
    """Refuse what makes a file too large, such as a whole head: its name says more than a number of bytes."""
    try:
        tensors = read_header(path, _MAX_CONFIG_BYTES)
    except ModelLoadError:
        return  # then its size is the first thing to mend
    try:
        _targets(tensors, {}, numbers, _OTHERS)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from None


def _check_config(config: Mapping[str, Any], allowed: Collection[str]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelLoadError(f"peft_type must be LORA, got {str(kind)[:100]!r}")
    for key, value in config.items():
        if key in _REFUSED and key not in allowed and value:
            cure = _CURE if key in _MERGEABLE else ""
            raise ModelLoadError(f"adapters with {_REFUSED[key]} are not served{cure}")
        if key not in _REFUSED and key not in _IGNORED and key not in _READ and value:
            raise ModelLoadError(f"its key {key[:100]!r} is unknown and may change the arithmetic")
    if config.get("bias", "none") != "none" and "bias" not in allowed:
        given = str(config["bias"])[:100]
        raise ModelLoadError(f"adapters with biases (bias: {given!r}) are not served{_CURE}")
    first = config.get("init_lora_weights")
    # `peft` accepts "gaussian" in any case, and the other two only as written.
    is_plain = first is None or type(first) is bool or first in _PLAIN_BEGINNINGS
    if not is_plain and not (isinstance(first, str) and first.lower() == _PLAIN_BEGINNINGS[0]):
        raise ModelLoadError(
            f"adapters that begin as {str(first)[:100]!r} (init_lora_weights) belong to a base that they "
            "changed and are not served: save it with path_initial_model_for_weight_conversion"
        )


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:  # NaN is in no range
        raise ModelLoadError(f"{name} must be a positive number, got {str(value)[:100]!r}")
    return float(value)


class _Numbers:
    """Ranks and alphas: from the first pattern that matches a module, or the default for all modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.is_rslora = bool(config.get("use_rslora"))
        self.is_dora = bool(config.get("use_dora"))
        self._rank, self._alpha = (_number(key, config.get(key)) for key in ("r", "lora_alpha"))
        self.parameters = _parameters(config)
        self._ranks, self._alphas = (_patterns(config, key) for key in ("rank_pattern", "alpha_pattern"))

    def rank(self, module: str) -> float:
        return self._ranks.find(module, self._rank)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return self._alphas.find(module, self._alpha) / (math.sqrt(rank) if self.is_rslora else rank)


def _parameters(config: Mapping[str, Any]) -> tuple[str, ...]:
    given = config.get("target_parameters") or []
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise ModelLoadError("target_parameters must be a list of names")
    return tuple(given)


def _patterns(config: Mapping[str, Any], key: str) -> Patterns:
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise ModelLoadError(f"{key} must be an object")
    try:
        return Patterns({
            pattern: _number(repr(pattern[:100]), value) for pattern, value in given.items()
        })  # fmt: skip
    except ModelLoadError as error:
        raise ModelLoadError(f"{key}: {error}") from None


class _Parts(NamedTuple):
    """The tensors of an adapter's file.

    Attributes:
        matrices: By their names.
        magnitudes, rows: By module.
        whole: By their names in the base.
    """

    matrices: Mapping[str, SafeTensor]
    magnitudes: dict[str, SafeTensor]
    whole: dict[str, SafeTensor]
    rows: dict[str, SafeTensor]


def _split(tensors: Mapping[str, SafeTensor]) -> _Parts:
    matrices: dict[str, SafeTensor] = {}
    parts = _Parts(matrices, {}, {}, {})
    for name, tensor in tensors.items():
        base_name = name.removeprefix(_PREFIX)
        stem = base_name.removesuffix(".weight")
        if stem.endswith(_MAGNITUDE):
            parts.magnitudes[stem.removesuffix(_MAGNITUDE)] = tensor
        elif stem.endswith(_BASE):  # what LoRA then changes: an embedding or head, perhaps of another size
            parts.whole[stem.removesuffix(_BASE) + ".weight"] = tensor
        elif name.endswith(f"{_BASE}.bias"):  # of a module that LoRA changes
            parts.whole[base_name.removesuffix(f"{_BASE}.bias") + ".bias"] = tensor
        elif name.endswith(_ROWS):
            parts.rows[base_name.removesuffix(_ROWS)] = tensor
        elif ".lora_" in name or any(part in name for part in _UNSUPPORTED_TENSORS):
            matrices[name] = tensor
        else:
            parts.whole[base_name] = tensor
    return parts


def _rows(config: Mapping[str, Any], module: str, rows: SafeTensor) -> PeftRows:
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):  # by the end of a module's path
        given = next((ids for end, ids in given.items() if f".{module}".endswith(f".{end}")), None)
    if not isinstance(given, list) or not all(type(each) is int and each >= 0 for each in given):
        raise ModelLoadError(f"trainable_token_indices has no list of token ids for tensor {rows.name!r}")
    if len(rows.shape) != 2 or rows.shape[0] != len(given):
        raise ModelLoadError(
            f"tensor {rows.name!r} has the shape {list(rows.shape)}, {len(given)} tokens are named"
        )
    if rows.dtype not in _DTYPES:
        raise ModelLoadError(f"tensor {rows.name!r} is of dtype {rows.dtype}: {', '.join(_DTYPES)} are read")
    return PeftRows(module, tuple(given), rows)


def _check_rank(tensor: SafeTensor, rank: float) -> None:
    if tensor.shape[0] != rank:
        raise ModelLoadError(
            f"tensor {tensor.name!r} has the rank {tensor.shape[0]}, the configuration says {rank:g}"
        )


def _targets(
    tensors: Mapping[str, SafeTensor],
    magnitudes: Mapping[str, SafeTensor],
    numbers: _Numbers,
    others: Mapping[str, str],
) -> list[PeftTarget]:
    found: list[PeftTarget] = []
    if magnitudes and not numbers.is_dora:
        raise ModelLoadError(f"tensor {next(iter(magnitudes.values())).name!r} is of DoRA, the rest is not")
    for name, tensor in tensors.items():
        end = next((end for end in others if name.endswith(end)), None)
        if end is None:
            what = next((what for part, what in _UNSUPPORTED_TENSORS.items() if part in name), None)
            reason = "is not a LoRA matrix" if what is None else f"belongs to {what}"
            raise ModelLoadError(f"tensor {name!r} {reason}, which is not supported")
        if f"{_PREFIX}{name}" in tensors:
            raise ModelLoadError(f"tensor {name!r} is also present with the prefix {_PREFIX!r}")
        other = name.removesuffix(end) + others[end]
        if other not in tensors:
            raise ModelLoadError(f"tensor {name!r} has no matching {other!r}")
        if tensor.dtype not in _DTYPES:
            raise ModelLoadError(f"tensor {name!r} is of dtype {tensor.dtype}: {', '.join(_DTYPES)} are read")
        if len(tensor.shape) != 2:
            raise ModelLoadError(f"tensor {name!r} must be a matrix, it has the shape {list(tensor.shape)}")
        if end in (_UP, _EMBEDDING_UP):
            continue
        module = name.removeprefix(_PREFIX).removesuffix(end)
        if len(module) > _MAX_MODULE_CHARS:
            raise ModelLoadError(f"the name of tensor {name[:100]!r} is too long")
        if not numbers.parameters:  # else checked once the base says which targets are parameters
            _check_rank(tensor, numbers.rank(module))
        if numbers.is_dora and module not in magnitudes:
            raise ModelLoadError(f"tensor {name!r} has no magnitudes, which DoRA needs")
        magnitude = magnitudes.get(module)
        found.append(PeftTarget(module, tensor, tensors[other], numbers.scale(module), magnitude))
    lost = magnitudes.keys() - {target.module for target in found}
    if lost:
        raise ModelLoadError(f"tensor {magnitudes[min(lost)].name!r} belongs to no LoRA matrices")
    return found
