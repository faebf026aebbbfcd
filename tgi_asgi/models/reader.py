"""Reads a model's configuration key by key, from config.json or a GGUF file, and records the keys read.

Families use the names of config.json; those of GGUF files are translated. Once a family has read what it
knows, `finish` refuses remaining keys that might change the arithmetic, because silently different text is
the worst outcome. Without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sized
from typing import Any

import numpy as np

from tgi_asgi.errors import NotInFamily, check

# A word of a config.json key's name that suggests a change to what a model computes. Some are parts of longer
# words (layernorm, mscale), others also of words that mean something else (act in extract, rope in property).
_SUSPICIOUS = re.compile(r"softcap|scal|multiplier|norm|bias|window|alibi|^act|^factors?$|^rope|rope$")
# Words of keys that matter only in training.
_TRAINING = frozenset({"capacity", "dropout", "init", "initializer", "loss"})
_HARMLESS = frozenset({"rope_interleaved"})  # for any family
_GGUF_NAMES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "clip_qkv": "attention.clamp_kqv",
    "alibi_bias_max": "attention.max_alibi_bias",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), "expert_count"
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), "expert_used_count"),
    "moe_intermediate_size": "expert_feed_forward_length",
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "shared_intermediate_size"), "expert_shared_feed_forward_length"
    ),
    **dict.fromkeys(
        ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert"), "expert_shared_count"
    ),
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "num_nextn_predict_layers": "nextn_predict_layers",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "conv_L_cache": "shortconv.l_cache",
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_n_groups": "ssm.group_count",
    "mamba_d_state": "ssm.state_size",
    "mamba_d_conv": "ssm.conv_kernel",
}
# Prefixes of GGUF keys that matter only if the file has such tensors: dense Granite 4 files state sizes of
# experts and recurrent layers that they do not have.
_GGUF_PARTS = {"expert_shared_feed_forward_length": "_shexp.", "ssm.": ".ssm_"}
_MAX_INTEGER = 1 << 53  # beyond any size in a model; floats hold integers up to here exactly
_REQUIRED = object()


def as_float(value: int | float) -> float:
    """Return a number of a file as a float; JSON integers may exceed the range of floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


class Reader:
    """The keys of a configuration.

        reader = Reader.of_json(json.loads(Path("config.json").read_text()))
        reader = Reader.of_gguf(file.metadata, frozenset(file.tensors))
        hidden_size = reader.integer("hidden_size")

    Attributes:
        is_gguf: Whether the file is GGUF, which expresses some settings by tensor names.
        tensors: These names; empty for a config.json.
    """

    def __init__(self, values: Mapping[str, Any], *, is_gguf: bool, tensors: frozenset[str]) -> None:
        self.is_gguf, self.tensors = is_gguf, tensors
        self._values = values
        self._read: set[str] = set()
        self._own: dict[str, str] = {}  # this family's key names, by the usual ones

    @classmethod
    def of_json(cls, config: Mapping[str, Any]) -> Reader:
        """Read a `config.json` of transformers 4 or 5."""
        return cls(config, is_gguf=False, tensors=frozenset())

    @classmethod
    def of_gguf(cls, metadata: Mapping[str, Any], tensors: frozenset[str]) -> Reader:
        """Read a GGUF file's keys of its architecture; `vocab_size` may come from the tokenizer."""
        prefix = f"{metadata.get('general.architecture')}."
        values = {
            key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
        }
        # The only group of keys without the architecture's name as prefix.
        values |= {key: value for key, value in metadata.items() if key.startswith("xielu.")}
        tokens = metadata.get("tokenizer.ggml.tokens")
        if "vocab_size" not in values and isinstance(tokens, Sized):
            values["vocab_size"] = len(tokens)
        values = {
            key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()
        }
        return cls(values, is_gguf=True, tensors=tensors)

    @classmethod
    def of_clip(cls, metadata: Mapping[str, Any], tensors: frozenset[str]) -> Reader:
        """Read a projector file's keys of its vision tower, and those without a modality's name."""
        plain = {
            key.removeprefix("clip."): value for key, value in metadata.items() if key.startswith("clip.")
        }
        parts = ("vision.", "audio.", "gen.")
        values = {key: value for key, value in plain.items() if not key.startswith(parts)}
        values |= {
            key.removeprefix("vision."): value for key, value in plain.items() if key.startswith("vision.")
        }
        values = {
            key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()
        }
        return cls(values, is_gguf=True, tensors=tensors)

    def rename(self, **names: tuple[str, ...]) -> None:
        """Set the names of keys in this family's config.json; call before `defaults`.

        If the usual name has no value, the first of a key's other names that has one is used.
        """
        if self.is_gguf:
            return
        for key, own in names.items():
            given = [name for name in (key, *own) if self._values.get(name) is not None]
            self._own[key] = given[0] if given else key
            self._read.update(own)

    def prefer(self, **names: str) -> None:
        """Name a key for each of these whose value comes first, if a config.json has it."""
        for key, other in names.items():
            if not self.is_gguf and self.has(other):
                self.replace(key, self.get(other))

    def defaults(self, **values: Any) -> None:
        """Set the values of keys that a config.json lacks: the defaults of transformers' class."""
        if not self.is_gguf:
            missing = {key: value for key, value in values.items() if self._own.get(key, key) == key}
            self._values = {**missing, **self._values}

    def drop(self, *keys: str) -> None:
        """Drop keys of a config.json that this family's class in transformers does not have."""
        if not self.is_gguf:
            self._values = {key: value for key, value in self._values.items() if key not in keys}

    def without(self, *keys: str) -> Reader:
        """Return a view without these keys; its reads are recorded here."""
        names = {self._name(key) for key in keys}
        values = {key: value for key, value in self._values.items() if key not in names}
        view = Reader(values, is_gguf=self.is_gguf, tensors=self.tensors)
        view._read, view._own = self._read, self._own
        return view

    def replace(self, key: str, value: Any) -> None:
        """Replace a value whose further forms only the family knows, before the typed readers see it."""
        self._values = {**self._values, self._name(key): value}

    def get(self, key: str) -> Any:
        """Return a raw value; None if it is absent."""
        key = self._name(key)
        self._read.add(key)
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Return whether the file has a key, be it null."""
        return self._name(key) in self._values

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """Return an integer; None counts as absent."""
        value = self._given(key, default)
        is_per_layer = self.is_gguf and isinstance(value, list) and value != []
        if is_per_layer and value.count(value[0]) == len(value):
            value = value[0]
        check(type(value) is int, f"`{self._name(key)}` must be one integer, got {str(value)[:100]}")
        check(abs(value) <= _MAX_INTEGER, f"`{self._name(key)}` is larger than 2^53: {str(value)[:100]}")
        return int(value)

    def positive(self, key: str, largest: int) -> int:
        """Return an integer in 1..`largest`."""
        value = self.integer(key)
        check(0 < value <= largest, f"{self._name(key)} must be in 1..{largest}, got {value}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """Return a number; None counts as absent."""
        value = self._given(key, default)
        check(type(value) in (int, float), f"`{self._name(key)}` must be a number, got {str(value)[:100]}")
        return as_float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean; null is false, as in the code of `transformers`."""
        is_null = self._values.get(self._name(key), default) is None
        value = False if is_null else self._given(key, default)
        check(type(value) is bool, f"`{self._name(key)}` must be true or false, got {str(value)[:100]}")
        return bool(value)

    def require(self, **values: Any) -> None:
        """Refuse other values of keys than these; absent keys and nulls are fine.

        Raises:
            NotInFamily: if there is one; the message names it.
        """
        for key, value in values.items():
            given = self.get(key)
            if given is not None and given != value:
                raise NotInFamily(f"`{self._name(key)}` is {str(given)[:100]}, only {value} is supported")

    def ignore(self, *keys: str) -> None:
        """Declare that keys do not matter to this family."""
        self._read.update(map(self._name, keys))

    def finish(self, *more: str) -> None:
        """Refuse keys that were not read and might matter; these matter, whatever their names suggest.

        Raises:
            NotInFamily: if there is one; the message names it.
        """
        for key, value in self._values.items():
            if key not in self._read and (key in more or self._matters(key, value)):
                raise NotInFamily(
                    f"`{key}` is {str(value)[:100]}, which this server does not know for this architecture: "
                    "the model would compute something else"
                )

    def _matters(self, key: str, value: Any) -> bool:
        if self.is_gguf:
            for prefix, part in _GGUF_PARTS.items():
                if key.startswith(prefix):
                    return any(part in name for name in self.tensors)
            return key != "pooling_type" and not (key.startswith("expert_") and value == 0)
        words = key.lower().split("_")
        if key in _HARMLESS or _TRAINING.intersection(words) or not any(map(_SUSPICIOUS.search, words)):
            return False
        return not (value is None or value is False or (type(value) in (int, float) and value in (0, 1)))

    def _given(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        check(value is not _REQUIRED, f"the model's configuration lacks `{self._name(key)}`")
        return value

    def _name(self, key: str) -> str:
        return _GGUF_NAMES.get(key, key) if self.is_gguf else self._own.get(key, key)
