"""What a model looks like: one validated value, from a config.json or from a GGUF file's metadata.

Everything downstream (buffers, kernels, limits) trusts these numbers, so each is bounded here, and what the
kernels cannot compute is refused by name. Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models import registry

_MAX_CONTEXT = 1 << 24

# Inclusive bounds of every integer: wide enough for any model known, narrow enough that products of them
# stay within 64 bits.
_BOUNDS = {
    "vocab_size": (2, 1 << 21),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "num_layers": (1, 1 << 10),
    "num_heads": (1, 1 << 10),
    "num_kv_heads": (1, 1 << 10),
    "head_dim": (16, 256),  # what the attention kernels have
    "context_length": (1, _MAX_CONTEXT),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that the model was first trained on."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # this and the next two: llama3 only
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder-only transformer of the Llama kind.

        ModelConfig.from_json(json.loads(Path("config.json").read_text()))
        ModelConfig.from_gguf(file.metadata, frozenset(file.tensors))

    Raises:
        ModelLoadError: a number is out of bounds or contradicts another, or the model needs something
            that is not supported.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # tokens, prompt and output together
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a query sees so many positions, its own included; None: all
    has_qkv_bias: bool = False
    has_output_bias: bool = False  # of the product after attention
    has_mlp_bias: bool = False
    has_qk_norm: bool = False  # each head's queries and keys are normalised before they are rotated
    has_tied_embeddings: bool = False  # the head is the embedding

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            _check(
                type(value) is int and low <= value <= high,
                f"{name} must be an integer in {low}..{high}, got {value!r}",
            )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value > 0, f"{name} must be positive, got {value!r}")
        for spec in fields(self):
            if spec.name.startswith("has_"):
                value = getattr(self, spec.name)
                _check(type(value) is bool, f"{spec.name} must be true or false, got {value!r}")
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _check(
            self.sliding_window is None or 1 <= self.sliding_window < self.context_length,
            f"sliding_window must be positive, got {self.sliding_window}",
        )
        _check(self.head_dim % 16 == 0, f"head_dim must be a multiple of 16, got {self.head_dim}")

    @property
    def plain_length(self) -> int:
        """Tokens of a sequence of which each sees all before it: attention needs no window for them."""
        return self.context_length if self.sliding_window is None else self.sliding_window

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`, of transformers 4 or 5."""
        architectures = config.get("architectures") or [None]
        _check(
            isinstance(architectures, list) and isinstance(architectures[0], str),
            "config.json names no architecture",
        )
        family = registry.find_by_architecture(architectures[0])
        activation = config.get("hidden_act", "silu")
        _check(activation in ("silu", "swish"), f"hidden_act {activation!r} is not supported, only silu is")
        hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        has_attention_bias = bool(config.get("attention_bias", False))
        rope = _rope_parameters(config)
        context = _integer(config, "max_position_embeddings")
        has_window = bool(config.get("use_sliding_window", family.has_plain_window))
        window = (_integer(config, "sliding_window", 0) if has_window else 0) or context
        return cls(
            architecture=family.architecture,
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size"),
            num_layers=_integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
            head_dim=_integer(config, "head_dim", hidden_size // max(num_heads, 1)),
            context_length=context if family.has_plain_window else min(context, window),
            sliding_window=window if family.has_plain_window and window < context else None,
            norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope, "rope_theta", 10000.0),
            rope_scaling=_scaling_from_json(rope),
            has_qkv_bias=has_attention_bias if family.has_qkv_bias is None else family.has_qkv_bias,
            has_output_bias=has_attention_bias and family.has_qkv_bias is None,
            has_mlp_bias=bool(config.get("mlp_bias", False)),
            has_qk_norm=family.has_qk_norm,
            has_tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: frozenset[str]) -> ModelConfig:
        """Read a GGUF file's metadata; biases and a head of its own show by their tensors' names."""
        name = metadata.get("general.architecture")
        _check(isinstance(name, str), "the GGUF file names no general.architecture")
        family = registry.find_by_gguf_name(str(name))
        values = {
            key.removeprefix(f"{name}."): value
            for key, value in metadata.items()
            if key.startswith(f"{name}.")
        }
        _check(not values.get("expert_count"), "mixture-of-experts models are not supported")
        hidden_size, num_heads = (
            _integer(values, "embedding_length"),
            _integer(values, "attention.head_count"),
        )
        head_dim = _integer(values, "attention.key_length", hidden_size // max(num_heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            value = _integer(values, key, head_dim)
            _check(value == head_dim, f"{key} is {value}, but only the head size ({head_dim}) is supported")
        tokens = metadata.get("tokenizer.ggml.tokens")
        context = _integer(values, "context_length")
        window = _integer(values, "attention.sliding_window", 0) or context
        return cls(
            architecture=family.architecture,
            vocab_size=_integer(values, "vocab_size", None if tokens is None else len(tokens)),
            hidden_size=hidden_size,
            intermediate_size=_integer(values, "feed_forward_length"),
            num_layers=_integer(values, "block_count"),
            num_heads=num_heads,
            num_kv_heads=_integer(values, "attention.head_count_kv", num_heads),
            head_dim=head_dim,
            context_length=context if family.has_plain_window else min(context, window),
            sliding_window=window if family.has_plain_window and window < context else None,
            norm_eps=_number(values, "attention.layer_norm_rms_epsilon"),
            rope_theta=_number(values, "rope.freq_base", 10000.0),
            rope_scaling=_scaling_from_gguf(values),
            has_qkv_bias="blk.0.attn_q.bias" in tensor_names,
            has_output_bias="blk.0.attn_output.bias" in tensor_names,
            has_mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
            has_qk_norm=family.has_qk_norm,
            has_tied_embeddings="output.weight" not in tensor_names,
        )


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ModelLoadError(message)


def _integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    _check(value is not None, f"the model's configuration lacks `{key}`")
    # A GGUF file may give one number a layer, which no supported family does.
    _check(type(value) is int, f"`{key}` must be one integer, got {str(value)[:100]}")
    return int(value)  # type: ignore[arg-type]


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    if value is None:
        value = default
    _check(value is not None, f"the model's configuration lacks `{key}`")
    _check(type(value) in (int, float), f"`{key}` must be a number, got {str(value)[:100]}")
    return float(value)  # type: ignore[arg-type]


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers 5 keeps in `rope_parameters` and 4 in `rope_theta` and `rope_scaling`."""
    parameters: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        nested = config.get(key)
        if nested is not None:
            _check(isinstance(nested, dict), f"`{key}` must be an object, got {str(nested)[:100]}")
            parameters |= {name: value for name, value in nested.items() if value is not None}
    fraction = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    _check(fraction in (None, 1, 1.0), f"partial_rotary_factor {fraction!r} is not supported")
    return parameters


def _scaling_from_json(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return _checked(RopeScaling("linear", _number(rope, "factor")))
    _check(kind == "llama3", f"rope scaling of type {kind!r} is not supported, only linear and llama3 are")
    return _checked(
        RopeScaling(
            "llama3",
            _number(rope, "factor"),
            _number(rope, "low_freq_factor"),
            _number(rope, "high_freq_factor"),
            _integer(rope, "original_max_position_embeddings"),
        )
    )


def _scaling_from_gguf(values: Mapping[str, Any]) -> RopeScaling | None:
    """Read linear scaling; llama3's comes as a tensor of factors instead (`rope_freqs.weight`).

    As in llama.cpp a factor without a type is linear, and files of 2023 have it by another name.
    """
    kind = values.get("rope.scaling.type", "linear")
    if kind == "none":
        return None
    _check(kind == "linear", f"rope scaling of type {kind!r} is not supported in GGUF files, only linear is")
    key = "rope.scaling.factor"
    if key not in values and "rope.scale_linear" in values:
        key = "rope.scale_linear"
    if "rope.scaling.type" not in values and values.get(key, 0) in (0, 1):
        return None
    return _checked(RopeScaling("linear", _number(values, key)))


def _checked(scaling: RopeScaling) -> RopeScaling:
    _check(1.0 <= scaling.factor <= 1e6, f"the rope scaling factor must be in 1..1e6, got {scaling.factor}")
    _check(
        scaling.kind == "linear" or 0 < scaling.low_freq_factor < scaling.high_freq_factor < 1e6,
        "rope scaling needs 0 < low_freq_factor < high_freq_factor",
    )
    _check(
        1 <= scaling.original_context <= _MAX_CONTEXT,
        f"original_max_position_embeddings must be in 1..{_MAX_CONTEXT}, got {scaling.original_context}",
    )
    return scaling
