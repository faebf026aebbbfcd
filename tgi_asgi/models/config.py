"""A model's configuration as one validated value, which a family reads from config.json or a GGUF file.

`config_bounds.py` has the bounds of its numbers. Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol

from tgi_asgi.errors import check
from tgi_asgi.model_info import EncoderDecoder
from tgi_asgi.models.config_bounds import (
    BOUNDS,
    MAX_CONTEXT,
    MAX_LABELS,
    MAX_LAYERS,
    check_computed,
    check_layer,
    check_shared,
)
from tgi_asgi.models.layer_spec import ImageSpec, LayerSpec
from tgi_asgi.models.recurrent_specs import RecurrentSpec
from tgi_asgi.models.shard import ModelCut

if TYPE_CHECKING:
    from tgi_asgi.ops import StateShape


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The shape of one layer's keys and values, and how long a sequence needs them."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None  # positions this far back are never read again; 1 is the token itself
    is_latent: bool = False  # one head, whose values are the first dims of its keys


class ServedConfig(Protocol):
    """What the runner needs to know about a model, native or not."""

    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocabulary_sizes(self) -> Sequence[int]:
        """Numbers of elements of embeddings and heads, which `--quantize` leaves at 8 bits or more."""

    @property
    def context_length(self) -> int: ...
    @property
    def longest_context(self) -> int:
        """Maximum context that may be requested; `context_length` is the default."""

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""

    @property
    def num_labels(self) -> int:
        """Number of a classifier's labels; 0: not a classifier."""

    @property
    def caches(self) -> Sequence[CacheShape]:
        """Shapes of the keys and values, for each layer that has any."""

    @property
    def other_bytes_per_token(self) -> int:
        """Bytes per token besides the keys and values."""

    @property
    def states(self) -> Sequence[StateShape]:
        """State shapes of the recurrent layers."""

    @property
    def other_state_bytes(self) -> int:
        """Bytes per sequence besides these states, independent of its length."""

    @property
    def other_kept_bytes(self) -> int:
        """Bytes of a kept state besides these states."""

    @property
    def rotary_dims(self) -> Sequence[int]:
        """The dims of the rotary tables that are computed for every position."""

    @property
    def has_states(self) -> bool:
        """Whether a sequence has state besides keys and values, without which it cannot continue."""

    @property
    def encoder_decoder(self) -> EncoderDecoder | None:
        """What sets an encoder-decoder apart; None for other models."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder-only transformer.

    Raises:
        ModelLoadError: if a number is out of bounds or contradicts another.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # tokens, prompt and output together
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    activation: str = "silu"
    has_qkv_bias: bool = False
    has_output_bias: bool = False  # of the product after attention
    # Whether heads' results are multiplied by the sigmoid of gates: one per value, from the queries' product,
    # or one per head, from a product of its own.
    has_output_gate: bool = False
    has_head_gates: bool = False
    has_mlp_bias: bool = False
    has_gate: bool = True  # whether the MLP is f(gate) * up instead of f(up)
    is_parallel: bool = False  # whether attention and MLP both read the layer's input
    has_mlp_norm: bool = True  # False: the MLP uses the norm before attention
    has_qk_norm: bool = False  # whether queries and keys are normalised, by default before rotation
    has_late_qk_norm: bool = False  # whether that happens after rotation
    has_value_norm: bool = False  # whether values are normalised, too, without a weight
    has_interleaved_rope: bool = False  # whether dims 2i and 2i + 1 rotate together
    has_learned_positions: bool = False  # position embeddings are added to the token embedding
    has_layer_norm: bool = False  # LayerNorm instead of RMSNorm
    has_norm_weight: bool = True
    has_norm_bias: bool = False
    norm_offset: float = 0.0  # added to the norms' weights
    clip: float | None = None  # q, k and v are clamped to [-clip, clip]
    has_tied_embeddings: bool = False  # whether the head is the embedding
    has_head_bias: bool = False
    embedding_factor: float = 1.0  # factor on the embedding
    layer_input_size: int = 0  # size of the embedding that each layer has of its own; 0: none
    residual_factor: float = 1.0  # factor on what a layer's parts add to the residual
    logits_scale: float = 1.0
    logits_cap: float = 0.0  # logits become cap * tanh(logit / cap); 0: no cap
    has_head: bool = True  # False: the model has no head, and the embedding is used as one
    num_labels: int = 0  # labels of a classifier, whose head has a row per label; 0: not a classifier
    images: ImageSpec | None = None  # where images' rows enter, for models that accept images
    cut: ModelCut | None = None  # the part that this shard computes; None: all

    def __post_init__(self) -> None:
        _check(self)

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return self.has_head and not self.num_labels

    @property
    def longest_context(self) -> int:
        """Maximum context; unlimited if the rotary tables depend on the served context (dynamic scaling)."""
        ropes = [layer.rope for layer in self.layers if layer.rope is not None]
        is_dynamic = any(rope.scaling is not None and rope.scaling.kind == "dynamic" for rope in ropes)
        return MAX_CONTEXT if is_dynamic else self.context_length

    @property
    def vocabulary_sizes(self) -> tuple[int, int]:
        """Numbers of elements of the embedding, and of all layers' own."""
        return self.vocab_size * self.hidden_size, self.vocab_size * self.num_layers * self.layer_input_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def of_layer(self, index: int) -> ModelConfig:
        """Return the configuration with the sizes of this layer."""
        sizes = self.layers[index].sizes
        if sizes is None:
            return self
        return replace(
            self, num_kv_heads=sizes.num_kv_heads, head_dim=sizes.head_dim,
            intermediate_size=sizes.intermediate_size,
        )  # fmt: skip

    @property
    def caches(self) -> tuple[CacheShape, ...]:
        """Shapes of the keys and values of each layer that has its own."""
        return tuple(self._cache(layer) for layer in self.layers if layer.has_cache)

    def _cache(self, layer: LayerSpec) -> CacheShape:
        latent, sizes = layer.latent, layer.sizes
        if latent is None:
            num_kv_heads = self.num_kv_heads if self.cut is None else len(self.cut.kv_heads)
            head_dim = self.head_dim
            if sizes is not None:
                num_kv_heads, head_dim = sizes.num_kv_heads, sizes.head_dim
            return CacheShape(num_kv_heads, head_dim, head_dim, layer.window)
        return CacheShape(1, latent.rank + latent.rotary_dim, latent.rank, layer.window, is_latent=True)

    @property
    def states(self) -> tuple[RecurrentSpec, ...]:
        """State of each recurrent layer."""
        return tuple(layer.recurrent for layer in self.layers if layer.recurrent is not None)

    @property
    def has_states(self) -> bool:
        return bool(self.states)

    @property
    def encoder_decoder(self) -> None:
        return None

    @property
    def other_bytes_per_token(self) -> int:
        return 0

    @property
    def other_state_bytes(self) -> int:
        return 0

    @property
    def other_kept_bytes(self) -> int:
        return 0

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """The dims of each rotary table, and of its copy if that is padded for the kernels."""
        dims = [rope.dim for rope in {layer.rope for layer in self.layers} if rope is not None]
        is_padded = any(layer.latent is None for layer in self.layers)
        padded = [-(-dim // 32) * 32 for dim in dims if dim % 32 and is_padded]
        return (*dims, *padded)


def _check(config: ModelConfig) -> None:
    for name, (low, high) in BOUNDS.items():
        value = getattr(config, name)
        refuse = check_computed if name == "head_dim" else check  # a limit of the native kernels
        refuse(
            type(value) is int and low <= value <= high,
            f"{name} must be an integer in {low}..{high}, got {value!r}",
        )
    for name in ("norm_eps", "embedding_factor", "residual_factor", "logits_scale"):
        value = getattr(config, name)
        check(math.isfinite(value) and value > 0, f"{name} must be positive, got {value!r}")
    cap, clip = config.logits_cap, config.clip
    check(0 <= cap < math.inf, f"logits_cap must not be negative, got {cap!r}")
    check(clip is None or 0 < clip < math.inf, f"the bound of q, k and v must be positive, got {clip!r}")
    has_known_mlp = not config.has_gate or config.activation != "xielu"
    check_computed(has_known_mlp, "xielu needs an MLP without a gate")
    for spec in fields(config):
        if spec.name.startswith(("has_", "is_")):
            value = getattr(config, spec.name)
            check(type(value) is bool, f"{spec.name} must be true or false, got {value!r}")
    num_layers, num_labels = len(config.layers), config.num_labels
    check(1 <= num_layers <= MAX_LAYERS, f"layers must be 1..{MAX_LAYERS}, got {num_layers}")
    check(
        config.num_heads % config.num_kv_heads == 0,
        f"num_heads ({config.num_heads}) must be a multiple of num_kv_heads ({config.num_kv_heads})",
    )
    check(0 <= num_labels <= MAX_LABELS, f"num_labels must be 0..{MAX_LABELS}, got {num_labels}")
    check_computed(config.head_dim % 2 == 0, f"head_dim must be even, got {config.head_dim}")
    low, high = BOUNDS["hidden_size"]
    inputs = config.layer_input_size
    check(
        inputs == 0 or low <= inputs <= high,
        f"the layers' own embeddings must be {low}..{high} wide, got {inputs}",
    )
    for layer in set(config.layers):
        check_layer(layer, config.num_heads, config.head_dim)
    check_shared(config.layers)
