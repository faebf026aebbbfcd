"""Read adapters as `peft` writes them: `adapter_config.json`, and which matrices its safetensors file has.

What would change the arithmetic and is not computed here is refused by name, as is every key of the
configuration that nobody knows. Pickled adapters (`adapter_model.bin`) are never read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import parse_json_object, read_file
from tgi_asgi.formats.patterns import Patterns
from tgi_asgi.formats.safetensors import SafeTensor, SafetensorsFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # without it `transformers` saves, with save_peft_format=False
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_DTYPES = ("F32", "F16", "BF16")
# Keys that are about training, or that others here make needless: the file's matrices say where they belong.
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
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
_READ = frozenset({
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "use_rslora",
})  # fmt: skip
# First values of the matrices that leave the base as it is. With others (PiSSA, OLoRA, CorDA, LoftQ and
# others) `peft` takes something from the base when it loads them: `LoraLayer.update_layer`, 0.21. Those that
# `path_initial_model_for_weight_conversion` has converted are saved as plain ones, with true.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal")
# What a name of the file that is none of the two matrices says.
_STRANGERS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding": "embeddings",
    "lora_B.bias": "biases (lora_bias)",
    "modules_to_save": "whole modules (modules_to_save)",
}
_MAX_CONFIG_BYTES = 4 << 20
_MAX_WEIGHT_BYTES = 1 << 30  # unless the caller knows what its model can have
_MAX_MODULE_CHARS = 256  # a pattern's search takes their square


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
    """An adapter's directory, read and checked; close it.

    Its files may be written while they are read: both are read once, and what was read is what is checked,
    computed and digested.

    Attributes:
        targets: what it changes.
        digest: of all its bytes.
        num_bytes: of its matrices.
        base: what its configuration says that it was trained on, or None.
    """

    def __init__(self, directory: Path, max_bytes: int = _MAX_WEIGHT_BYTES, why: str = "") -> None:
        """Read a directory.

        Args:
            max_bytes: that the file of matrices may have; `why` follows it in the message.

        Raises:
            ModelLoadError: a file is missing, too large or damaged, or the adapter is of a kind that is not
                computed.
        """
        where = directory / CONFIG_NAME
        text = read_file(where, _MAX_CONFIG_BYTES)
        try:
            config = parse_json_object(text.tobytes())
            _check_config(config)
            numbers = _Numbers(config)
        except ModelLoadError as error:
            raise ModelLoadError(f"{where}: {error}") from None
        base = config.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) else None
        path = directory / WEIGHTS_NAME
        data = _read_weights(path, max_bytes, why)
        self._file = SafetensorsFile(path, data)
        try:
            self.targets = _targets(self._file, numbers)
        except ModelLoadError as error:
            self._file.close()
            raise ModelLoadError(f"{path}: {error}") from None
        self.num_bytes = sum(target.down.nbytes + target.up.nbytes for target in self.targets)
        hasher = hashlib.blake2b(text.data, digest_size=16)
        hasher.update(data.data)
        self.digest = hasher.digest()

    def raw(self, tensor: SafeTensor) -> Any:
        """Return a matrix's bytes, as `SafetensorsFile.raw`."""
        return self._file.raw(tensor.name)

    def close(self) -> None:
        """Let go of the bytes; what `raw` has returned stays valid."""
        self._file.close()


def _read_weights(path: Path, max_bytes: int, why: str) -> npt.NDArray[np.uint8]:
    try:
        return read_file(path, max_bytes, why)
    except ModelLoadError:
        if os.path.exists(path.with_suffix(".bin")) and not os.path.exists(path):
            raise ModelLoadError(
                f"{path.parent}: pickled adapters are never read, save {WEIGHTS_NAME}"
            ) from None
        raise


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
    first = config.get("init_lora_weights")
    # `peft` takes "gaussian" in any case, and these two as they are.
    is_plain = first is None or type(first) is bool or first in _PLAIN_BEGINNINGS
    if not is_plain and not (isinstance(first, str) and first.lower() == _PLAIN_BEGINNINGS[0]):
        raise ModelLoadError(
            f"adapters that begin as {str(first)[:100]!r} (init_lora_weights) belong to a base that they "
            "changed and are not served: save it with path_initial_model_for_weight_conversion"
        )


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value < 1e9:
        raise ModelLoadError(f"{name} must be a positive number, got {str(value)[:100]!r}")
    return float(value)


class _Numbers:
    """Ranks and alphas: as the first pattern that matches a module says, else as all modules have them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.is_rslora = bool(config.get("use_rslora"))
        self._rank, self._alpha = (_number(key, config.get(key)) for key in ("r", "lora_alpha"))
        self._ranks, self._alphas = (_patterns(config, key) for key in ("rank_pattern", "alpha_pattern"))

    def rank(self, module: str) -> float:
        return self._ranks.find(module, self._rank)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return self._alphas.find(module, self._alpha) / (math.sqrt(rank) if self.is_rslora else rank)


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


def _targets(file: SafetensorsFile, numbers: _Numbers) -> list[PeftTarget]:
    found: list[PeftTarget] = []
    for name, tensor in file.tensors.items():
        module = name.removeprefix(_PREFIX).removesuffix(_DOWN).removesuffix(_UP)
        if not name.endswith((_DOWN, _UP)):
            what = next((what for part, what in _STRANGERS.items() if part in name), None)
            reason = "is no matrix of LoRA" if what is None else f"belongs to {what}"
            raise ModelLoadError(f"tensor {name!r} {reason}: it is not served")
        if f"{_PREFIX}{name}" in file.tensors:
            raise ModelLoadError(f"tensor {name!r} is there with the prefix {_PREFIX!r}, too")
        prefix = name.removesuffix(_DOWN).removesuffix(_UP).removesuffix(module)
        other = f"{prefix}{module}{_UP if name.endswith(_DOWN) else _DOWN}"
        if other not in file.tensors:
            raise ModelLoadError(f"tensor {name!r} has no {other!r} beside it")
        if tensor.dtype not in _DTYPES:
            raise ModelLoadError(f"tensor {name!r} is of dtype {tensor.dtype}: {', '.join(_DTYPES)} are read")
        if len(tensor.shape) != 2:
            raise ModelLoadError(f"tensor {name!r} must be a matrix, it has the shape {list(tensor.shape)}")
        if name.endswith(_UP):
            continue
        if len(module) > _MAX_MODULE_CHARS:
            raise ModelLoadError(f"the name of tensor {name[:100]!r} is too long")
        rank = numbers.rank(module)
        if tensor.shape[0] != rank:
            raise ModelLoadError(
                f"tensor {name!r} has the rank {tensor.shape[0]}, the configuration says {rank:g}"
            )
        found.append(PeftTarget(module, tensor, file.tensors[other], numbers.scale(module)))
    if not found:
        raise ModelLoadError("it changes nothing: there are no matrices in it")
    return found
