"""An adapter's `adapter_config.json`, of which nothing that may change the arithmetic is ignored.

Unsupported options and unknown keys are refused by name. Called by `peft.py`, which reads the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.patterns import Patterns

ADAPTER_FILES = ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

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
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")


class PeftConfig:
    """An adapter's configuration; ranks and alphas are those of the first pattern that matches a module.

    Attributes:
        is_dora: Whether each module has magnitudes.
        parameters: The ends of the paths of the parameters that the adapter changes (`target_parameters`).
    """

    def __init__(self, config: Mapping[str, Any], *, is_merged: bool) -> None:
        """Check a configuration.

        Args:
            is_merged: Whether to accept what only merging supports.

        Raises:
            ModelLoadError: if it asks for something unsupported or unknown.
        """
        _check(config, _MERGEABLE if is_merged else ())
        self.is_dora = bool(config.get("use_dora"))
        self.parameters = _parameters(config)
        self._is_rslora = bool(config.get("use_rslora"))
        self._rank, self._alpha = (_number(key, config.get(key)) for key in ("r", "lora_alpha"))
        self._ranks, self._alphas = (_patterns(config, key) for key in ("rank_pattern", "alpha_pattern"))
        self._token_ids = config.get("trainable_token_indices")

    def rank(self, module: str) -> float:
        """Return the rank of a module's matrices."""
        return self._ranks.find(module, self._rank)

    def scale(self, module: str) -> float:
        """Return the factor of the product of a module's matrices."""
        rank = self.rank(module)
        return self._alphas.find(module, self._alpha) / (math.sqrt(rank) if self._is_rslora else rank)

    def token_ids(self, module: str) -> tuple[int, ...] | None:
        """Return the tokens whose rows an embedding replaces; None if the file has no list of them."""
        given = self._token_ids
        if isinstance(given, dict):  # by the end of a module's path; a tied head is not in it
            found = [ids for end, ids in given.items() if f".{module}".endswith(f".{end}")]
            given = next(iter([*found, *given.values()]), None)
        if not isinstance(given, list) or not all(type(each) is int and each >= 0 for each in given):
            return None
        return tuple(given)


def _check(config: Mapping[str, Any], allowed: Collection[str]) -> None:
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
    # `peft` accepts "gaussian" in any case, and most others only as written.
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
