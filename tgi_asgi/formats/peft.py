"""Read LoRA adapters in `peft`'s format: `adapter_config.json`, and the matrices in the safetensors file.

`peft_config.py` checks the former, and refuses by name what would change the arithmetic and is not supported.
Pickled adapters (`adapter_model.bin`) are never read. What is merged into its base model
(`models/loading/merged.py`) may do more than what is computed beside it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import map_file, parse_json_object, read_file
from tgi_asgi.formats.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PeftConfig
from tgi_asgi.formats.safetensors import SafeTensor, SafetensorsFile, read_header

_PREFIX = "base_model.model."  # absent if saved by `transformers` with save_peft_format=False
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_DOWN, _EMBEDDING_UP = ".lora_embedding_A", ".lora_embedding_B"
# Ends of matrices' names, each with that of the other matrix of the module.
_OTHERS = {_DOWN: _UP, _UP: _DOWN}
_MERGED_OTHERS = {**_OTHERS, _EMBEDDING_DOWN: _EMBEDDING_UP, _EMBEDDING_UP: _EMBEDDING_DOWN}
_TOKENS = ".token_adapter"
_ROWS = f"{_TOKENS}.trainable_tokens_delta"
_BASE = ".base_layer"
_MAGNITUDE = ".lora_magnitude_vector"  # older versions of `peft` append .weight
# With `bias: all`, peft saves the bias of a whole module (`modules_to_save`) under these names, too.
_WRAPPED = (".modules_to_save.", ".original_module.")
_DTYPES = ("F32", "F16", "BF16")
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
        where = directory / ADAPTER_CONFIG
        text = read_file(where, _MAX_CONFIG_BYTES)
        try:
            self._config = config = PeftConfig(parse_json_object(text.tobytes()), is_merged=is_merged)
        except ModelLoadError as error:
            raise ModelLoadError(f"{where}: {error}") from None
        self.parameters = config.parameters
        path = directory / ADAPTER_WEIGHTS
        data = _map_weights(path) if is_merged else _read_weights(path, max_bytes, why, config)
        self._file = SafetensorsFile(path, data)
        try:
            parts = _split(self._file.tensors) if is_merged else _Parts(self._file.tensors, {}, {}, {})
            self.rows = [_rows(config, module, tensor) for module, tensor in parts.rows.items()]
            others = _MERGED_OTHERS if is_merged else _OTHERS
            self.targets = _targets(parts.matrices, parts.magnitudes, config, others)
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
        _check_rank(target.down, self._config.rank(path) * num_matrices)
        return replace(target, module=path, scale=self._config.scale(path))

    def close(self) -> None:
        """Release the bytes; arrays that `raw` has returned stay valid."""
        self._file.close()


def _map_weights(path: Path) -> npt.NDArray[np.uint8]:
    _refuse_pickle(path)
    return map_file(path)


def _read_weights(path: Path, max_bytes: int, why: str, config: PeftConfig) -> npt.NDArray[np.uint8]:
    _refuse_pickle(path)
    try:
        return read_file(path, max_bytes, why)
    except ModelLoadError:
        if path.is_file() and path.stat().st_size > max_bytes:
            _check_names(path, config)
        raise


def _refuse_pickle(path: Path) -> None:
    if os.path.exists(path.with_suffix(".bin")) and not os.path.exists(path):
        raise ModelLoadError(f"{path.parent}: pickled adapters are never read, save {ADAPTER_WEIGHTS}")


def _check_names(path: Path, config: PeftConfig) -> None:
    """Refuse what makes a file too large, such as a whole head: its name says more than a number of bytes."""
    try:
        tensors = read_header(path, _MAX_CONFIG_BYTES)
    except ModelLoadError:
        return  # then its size is the first thing to mend
    try:
        _targets(tensors, {}, config, _OTHERS)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from None


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
        if any(part in name and name.replace(part, ".") in tensors for part in _WRAPPED):
            continue
        base_name = name.removeprefix(_PREFIX)
        stem = base_name.removesuffix(".weight")
        if stem.endswith(_MAGNITUDE):
            parts.magnitudes[stem.removesuffix(_MAGNITUDE)] = tensor
        elif stem.endswith(_BASE):  # what the adapter then changes: an embedding or head, perhaps resized
            parts.whole[stem.removesuffix(_BASE).removesuffix(_TOKENS) + ".weight"] = tensor
        elif name.endswith(f"{_BASE}.bias"):  # of a module that LoRA changes
            parts.whole[base_name.removesuffix(f"{_BASE}.bias") + ".bias"] = tensor
        elif name.endswith(_ROWS):
            parts.rows[base_name.removesuffix(_ROWS)] = tensor
        elif ".lora_" in name or any(part in name for part in _UNSUPPORTED_TENSORS):
            matrices[name] = tensor
        else:
            parts.whole[base_name] = tensor
    return parts


def _rows(config: PeftConfig, module: str, rows: SafeTensor) -> PeftRows:
    token_ids = config.token_ids(module)
    if token_ids is None:
        raise ModelLoadError(f"trainable_token_indices has no list of token ids for tensor {rows.name!r}")
    if len(rows.shape) != 2 or rows.shape[0] != len(token_ids):
        raise ModelLoadError(
            f"tensor {rows.name!r} has the shape {list(rows.shape)}, {len(token_ids)} tokens are named"
        )
    if rows.dtype not in _DTYPES:
        raise ModelLoadError(f"tensor {rows.name!r} is of dtype {rows.dtype}: {', '.join(_DTYPES)} are read")
    return PeftRows(module, token_ids, rows)


def _check_matrix(tensor: SafeTensor, other: str, tensors: Mapping[str, SafeTensor]) -> None:
    """Refuse one of a pair of LoRA matrices if it, or the `other` one, is not as the reader needs it."""
    name = tensor.name
    if f"{_PREFIX}{name}" in tensors:
        raise ModelLoadError(f"tensor {name!r} is also present with the prefix {_PREFIX!r}")
    if other not in tensors:
        raise ModelLoadError(f"tensor {name!r} has no matching {other!r}")
    if tensor.dtype not in _DTYPES:
        raise ModelLoadError(f"tensor {name!r} is of dtype {tensor.dtype}: {', '.join(_DTYPES)} are read")
    if len(tensor.shape) != 2:
        raise ModelLoadError(f"tensor {name!r} must be a matrix, it has the shape {list(tensor.shape)}")


def _check_rank(tensor: SafeTensor, rank: float) -> None:
    if tensor.shape[0] != rank:
        raise ModelLoadError(
            f"tensor {tensor.name!r} has the rank {tensor.shape[0]}, the configuration says {rank:g}"
        )


def _targets(
    tensors: Mapping[str, SafeTensor],
    magnitudes: Mapping[str, SafeTensor],
    config: PeftConfig,
    others: Mapping[str, str],
) -> list[PeftTarget]:
    found: list[PeftTarget] = []
    if magnitudes and not config.is_dora:
        raise ModelLoadError(f"tensor {next(iter(magnitudes.values())).name!r} is of DoRA, the rest is not")
    for name, tensor in tensors.items():
        end = next((end for end in others if name.endswith(end)), None)
        if end is None:
            what = next((what for part, what in _UNSUPPORTED_TENSORS.items() if part in name), None)
            reason = "is not a LoRA matrix" if what is None else f"belongs to {what}"
            raise ModelLoadError(f"tensor {name!r} {reason}, which is not supported")
        other = name.removesuffix(end) + others[end]
        _check_matrix(tensor, other, tensors)
        if end in (_UP, _EMBEDDING_UP):
            continue
        module = name.removeprefix(_PREFIX).removesuffix(end)
        if len(module) > _MAX_MODULE_CHARS:
            raise ModelLoadError(f"the name of tensor {name[:100]!r} is too long")
        if not config.parameters:  # else checked once the base says which targets are parameters
            _check_rank(tensor, config.rank(module))
        if config.is_dora and module not in magnitudes:
            raise ModelLoadError(f"tensor {name!r} has no magnitudes, which DoRA needs")
        magnitude = magnitudes.get(module)
        found.append(PeftTarget(module, tensor, tensors[other], config.scale(module), magnitude))
    lost = magnitudes.keys() - {target.module for target in found}
    if lost:
        raise ModelLoadError(f"tensor {magnitudes[min(lost)].name!r} belongs to no LoRA matrices")
    return found
