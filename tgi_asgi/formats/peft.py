"""Read adapters as `peft` writes them: `adapter_config.json`, and which matrices its safetensors file has.

What would change the arithmetic and is not computed here is refused by name, as is every key of the
configuration that nobody knows. Pickled adapters (`adapter_model.bin`) are never read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import map_file, read_json, release_pages
from tgi_asgi.formats.safetensors import SafeTensor, SafetensorsFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_DTYPES = ("F32", "F16", "BF16")
# Keys that are about training, or that others here make needless: the file's matrices say where they belong.
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
})  # fmt: skip
# Each with what it is called in messages; refused where it is neither absent, empty nor false.
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
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"})
# What a name of the file that is none of the two matrices says.
_STRANGERS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding": "embeddings",
    "lora_B.bias": "biases (lora_bias)",
    "modules_to_save": "whole modules (modules_to_save)",
}
# Patterns are regular expressions of a stranger's: bounded, and with nothing that backtracks for long.
_PATTERN = re.compile(r"(?:[\w.|^$()-]|\\[.d]|\[[\w-]+\]|[+*](?![+*?])){1,200}")
_MAX_REPEATS = 3


@dataclass(frozen=True, slots=True)
class PeftTarget:
    """The two matrices of a module, and what their product is multiplied by."""

    module: str  # the module's path in the base model
    down: SafeTensor  # [rank, columns]
    up: SafeTensor  # [rows, rank]
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class PeftAdapter:
    """An adapter's directory, opened and checked; close it.

    Attributes:
        targets: what it changes.
        digest: of all its bytes.
        num_bytes: of its matrices.
        base: what its configuration says that it was trained on, or None.
    """

    def __init__(self, directory: Path) -> None:
        """Open a directory.

        Raises:
            ModelLoadError: a file is missing or damaged, or the adapter is of a kind that is not computed.
        """
        config = read_json(directory / CONFIG_NAME)
        where = directory / CONFIG_NAME
        try:
            _check_config(config)
        except ModelLoadError as error:
            raise ModelLoadError(f"{where}: {error}") from None
        base = config.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) else None
        self._file = SafetensorsFile.open(_weights_in(directory))
        try:
            self.targets = _targets(self._file, config)
        except ModelLoadError as error:
            self._file.close()
            raise ModelLoadError(f"{self._file.path}: {error}") from None
        self.num_bytes = sum(target.down.nbytes + target.up.nbytes for target in self.targets)
        self.digest = _digest(directory / CONFIG_NAME, self._file.path)

    def raw(self, tensor: SafeTensor) -> Any:
        """Return a matrix's bytes, as `SafetensorsFile.raw`."""
        return self._file.raw(tensor.name)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


def _weights_in(directory: Path) -> Path:
    path = directory / WEIGHTS_NAME
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise ModelLoadError(f"{directory}: pickled adapters are never read, save {WEIGHTS_NAME}")
    return path


def _digest(*paths: Path) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    for path in paths:
        data = map_file(path)
        hasher.update(data.data)
        release_pages(data)
    return hasher.digest()


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelLoadError(f"peft_type must be LORA, got {str(kind)[:100]!r}")
    for key, value in config.items():
        if key in _REFUSED and value:
            raise ModelLoadError(f"adapters with {_REFUSED[key]} are not served")
        if key not in _REFUSED and key not in _IGNORED and key not in _READ and value:
            raise ModelLoadError(
                f"nothing is known of its key {key[:100]!r}, which may change the arithmetic"
            )
    if config.get("bias", "none") != "none":
        raise ModelLoadError(f"adapters with biases are not served (bias: {str(config['bias'])[:100]!r})")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ModelLoadError(f"{key} must be an object")
        for pattern, value in patterns.items():
            repeats = sum(pattern.count(character) for character in "*+")
            if not _PATTERN.fullmatch(pattern) or repeats > _MAX_REPEATS or re.search(r"\)[*+]", pattern):
                raise ModelLoadError(f"{key} has a pattern that is not read: {pattern[:100]!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelLoadError(f"{key} has a pattern that is damaged: {error}") from None
            _number(f"{key}[{pattern!r}]", value)
    _number("r", config.get("r"))
    _number("lora_alpha", config.get("lora_alpha"))


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value < 1e9:
        raise ModelLoadError(f"{name} must be a positive number, got {str(value)[:100]!r}")
    return float(value)


def _of_module(config: Mapping[str, Any], key: str, default: str, module: str) -> float:
    """Return a number as the first pattern that matches the module says, else as all modules have it."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[default])


def _targets(file: SafetensorsFile, config: Mapping[str, Any]) -> list[PeftTarget]:
    found: list[PeftTarget] = []
    for name, tensor in file.tensors.items():
        module = name.removeprefix(_PREFIX).removesuffix(_DOWN).removesuffix(_UP)
        if not name.startswith(_PREFIX) or not name.endswith((_DOWN, _UP)):
            what = next((what for part, what in _STRANGERS.items() if part in name), None)
            reason = "is no matrix of LoRA" if what is None else f"belongs to {what}"
            raise ModelLoadError(f"tensor {name!r} {reason}: it is not served")
        other = f"{_PREFIX}{module}{_UP if name.endswith(_DOWN) else _DOWN}"
        if other not in file.tensors:
            raise ModelLoadError(f"tensor {name!r} has no {other!r} beside it")
        if tensor.dtype not in _DTYPES:
            raise ModelLoadError(f"tensor {name!r} is of dtype {tensor.dtype}: {', '.join(_DTYPES)} are read")
        if len(tensor.shape) != 2:
            raise ModelLoadError(f"tensor {name!r} must be a matrix, it has the shape {list(tensor.shape)}")
        if name.endswith(_UP):
            continue
        rank = _of_module(config, "rank_pattern", "r", module)
        if tensor.shape[0] != rank:
            raise ModelLoadError(
                f"tensor {name!r} has the rank {tensor.shape[0]}, the configuration says {rank:g}"
            )
        alpha = _of_module(config, "alpha_pattern", "lora_alpha", module)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found.append(PeftTarget(module, tensor, file.tensors[other], scale))
    if not found:
        raise ModelLoadError("it changes nothing: there are no matrices in it")
    return found
