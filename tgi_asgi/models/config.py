"""A model's configuration as one validated value, which a family reads from config.json or a GGUF file.

Buffers, kernels and limits trust these numbers, so each is bounded here. Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Protocol

from tgi_asgi.errors import NotInFamily, check
from tgi_asgi.model_info import EncoderDecoder
from tgi_asgi.models.latent_spec import LatentSpec
from tgi_asgi.models.recurrent_specs import GatedDeltaSpec, HybridSpec, MambaSpec, RecurrentSpec
from tgi_asgi.models.shard import ModelCut

if TYPE_CHECKING:
    from tgi_asgi.ops import StateShape

MAX_CONTEXT = 1 << 24
MAX_HEADS = 1 << 10

# Inclusive bounds of every integer: wide enough for any known model, narrow enough that their products fit 64
# bits.
_BOUNDS = {
    "vocab_size": (2, 1 << 21),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "num_heads": (1, MAX_HEADS),
    "num_kv_heads": (1, MAX_HEADS),
    "head_dim": (2, 256),  # limit of the attention kernels
    "context_length": (1, MAX_CONTEXT),
}
MAX_LAYERS = 1 << 10
MAX_EXPERTS = 1 << 10  # per layer; limit of the kernels
MAX_LABELS = 1 << 16
MAX_STATE = 1 << 14  # bound of each factor of a recurrent state's size
MAX_TAPS = 16  # of a short convolution; limit of the kernels
MAX_KEY_DIM = 256  # of the gated delta rule; limit of the kernels


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that the model was first trained on."""

    kind: str  # linear, dynamic, llama3, yarn or longrope
    factor: float = 1.0
    original_context: int = 8192
    low_freq_factor: float = 1.0  # this and the next: llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # this and the next two: yarn
    beta_slow: float = 1.0
    is_truncated: bool = True
    attention_factor: float = 1.0  # on cosines and sines: yarn, longrope, and all kinds in a GGUF file
    # longrope: divisors of each frequency up to the original context, and beyond; None: stored in the GGUF
    # file
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    is_override: bool = False  # set by the administrator; then a GGUF file's tensors for it are ignored


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A rotary embedding of dims [0, dim) of each head, which rotates dim i together with i + dim / 2."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None
    frequencies: tuple[float, ...] | None = None  # per pair, if no formula yields them


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """The experts of a layer, and how tokens are routed to them; `ops.RouteSpec` defines the terms."""

    num_experts: int
    top_k: int  # experts per token
    intermediate_size: int
    kind: str = "softmax"
    has_correction: bool = False  # whether a vector is added to the scores for the selection only
    num_groups: int = 1
    top_groups: int = 1
    sums_top_two: bool = False
    is_renormalised: bool = False
    eps: float = 0.0
    scale: float = 1.0
    jitter: float = 0.01
    has_bias: bool = False  # of the router, and of the experts' products
    clamp: tuple[float, float, float] | None = None  # limit, slope and offset of gates (gpt-oss)
    shared_size: int = 0  # size of an MLP that all tokens use besides the experts; 0: none
    has_shared_gate: bool = False  # whether a gate per token scales that MLP


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Queries at position p are multiplied by 1 + beta * ln(1 + p // period) (Llama 4, Ministral 3)."""

    beta: float
    period: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer: its attention, and experts if it has them instead of an MLP.

    In a layer without attention the attention fields are ignored.
    """

    rope: RopeSpec | None  # None: no rotation
    window: int | None  # positions a query attends to, its own included; None: all
    scale: float  # factor on the attention scores
    chunk: int | None = None  # a query attends only within its own chunk of this many positions
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)
    slopes: tuple[float, ...] | None = None  # per head: ALiBi bias per position
    has_sinks: bool = False  # whether each head has an attention sink
    query_growth: QueryGrowth | None = None
    alphas: tuple[float, float] | None = None  # xIELU's two parameters, if the configuration has them
    experts: ExpertsSpec | None = None
    recurrent: RecurrentSpec | None = None  # replaces attention
    hybrid: HybridSpec | None = None  # the layer has both attention and a recurrent part, in parallel
    latent: LatentSpec | None = None  # latent attention (MLA), if the layer uses it

    @property
    def attends(self) -> bool:
        return self.recurrent is None or self.hybrid is not None


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
    has_output_gate: bool = False  # whether heads' results are multiplied by the sigmoid of a gate each
    has_mlp_bias: bool = False
    has_gate: bool = True  # whether the MLP is f(gate) * up instead of f(up)
    is_parallel: bool = False  # whether attention and MLP both read the layer's input
    has_mlp_norm: bool = True  # False: the MLP uses the norm before attention
    has_qk_norm: bool = False  # whether queries and keys are normalised, by default before rotation
    has_late_qk_norm: bool = False  # whether that happens after rotation
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
    residual_factor: float = 1.0  # factor on what a layer's parts add to the residual
    logits_scale: float = 1.0
    logits_cap: float = 0.0  # logits become cap * tanh(logit / cap); 0: no cap
    has_head: bool = True  # False: the model has no head, and the embedding is used as one
    num_labels: int = 0  # labels of a classifier, whose head has a row per label; 0: not a classifier
    cut: ModelCut | None = None  # the part that this shard computes; None: all

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return self.has_head and not self.num_labels

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            refuse = check_computed if name == "head_dim" else check  # a limit of the native kernels
            refuse(
                type(value) is int and low <= value <= high,
                f"{name} must be an integer in {low}..{high}, got {value!r}",
            )
        for name in ("norm_eps", "embedding_factor", "residual_factor", "logits_scale"):
            value = getattr(self, name)
            check(math.isfinite(value) and value > 0, f"{name} must be positive, got {value!r}")
        check(0 <= self.logits_cap < math.inf, f"logits_cap must not be negative, got {self.logits_cap!r}")
        check(
            self.clip is None or 0 < self.clip < math.inf,
            f"the bound of q, k and v must be positive, got {self.clip!r}",
        )
        check_computed(not self.has_gate or self.activation != "xielu", "xielu needs an MLP without a gate")
        for spec in fields(self):
            if spec.name.startswith(("has_", "is_")):
                value = getattr(self, spec.name)
                check(type(value) is bool, f"{spec.name} must be true or false, got {value!r}")
        check(1 <= len(self.layers) <= MAX_LAYERS, f"layers must be 1..{MAX_LAYERS}, got {len(self.layers)}")
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        check(
            0 <= self.num_labels <= MAX_LABELS, f"num_labels must be 0..{MAX_LABELS}, got {self.num_labels}"
        )
        check_computed(self.head_dim % 2 == 0, f"head_dim must be even, got {self.head_dim}")
        for layer in set(self.layers):
            self._check_layer(layer)

    def _check_layer(self, layer: LayerSpec) -> None:
        check(layer.window is None or layer.window >= 1, f"a window must be positive, got {layer.window}")
        check(
            math.isfinite(layer.scale) and layer.scale > 0,
            f"the scale of scores must be positive, got {layer.scale!r}",
        )
        check(layer.chunk is None or layer.chunk >= 1, f"a chunk must be positive, got {layer.chunk}")
        check(
            layer.soft_cap is None or 0 < layer.soft_cap < math.inf,
            f"the cap of scores must be positive, got {layer.soft_cap!r}",
        )
        check(
            layer.slopes is None
            or (len(layer.slopes) == self.num_heads and all(map(math.isfinite, layer.slopes))),
            f"there must be {self.num_heads} finite slopes",
        )
        if layer.experts is not None:
            _check_experts(layer.experts)
        growth = layer.query_growth
        check(
            growth is None or (0 <= growth.beta < 1e6 and 1 <= growth.period <= MAX_CONTEXT),
            f"queries grow by a beta in 0..1e6 each 1..{MAX_CONTEXT} positions, got {growth}",
        )
        if layer.recurrent is not None:
            _check_recurrent(layer.recurrent)
        if layer.hybrid is not None:
            check(layer.recurrent is not None, "a hybrid layer needs a recurrent part")
            parts = (layer.hybrid.attention, layer.hybrid.state, layer.hybrid.mlp)
            _check_factors("the factors of a layer's parts", [x for part in parts for x in astuple(part)])
        if layer.latent is not None:
            reason = layer.latent.refusal(None if layer.rope is None else layer.rope.dim)
            check_computed(reason is None, reason or "")
        rope = layer.rope
        if rope is None:
            return
        # transformers rounds an odd size up, in some architectures.
        check_computed(rope.dim % 2 == 0, f"the rotary size must be even, got {rope.dim}")
        check(
            2 <= rope.dim <= self.head_dim,
            f"the rotary size must be in 2..{self.head_dim}, the head size, got {rope.dim}",
        )
        check(
            math.isfinite(rope.theta) and rope.theta > 0, f"rope_theta must be positive, got {rope.theta!r}"
        )
        scaling = rope.scaling
        if scaling is not None:
            check(scaling.kind != "yarn" or rope.theta > 1, f"yarn needs rope_theta above 1: {rope.theta}")
            check(scaling.kind != "dynamic" or rope.dim > 2, "dynamic scaling needs more than 2 rotary dims")
            check_scaling(scaling)
            for factors in (scaling.short_factors, scaling.long_factors):
                check(
                    factors is None or len(factors) == rope.dim // 2,
                    f"longrope needs {rope.dim // 2} factors, got {len(factors or ())}",
                )

    @property
    def longest_context(self) -> int:
        """Maximum context; unlimited if the rotary tables depend on the served context (dynamic scaling)."""
        ropes = [layer.rope for layer in self.layers if layer.rope is not None]
        is_dynamic = any(rope.scaling is not None and rope.scaling.kind == "dynamic" for rope in ropes)
        return MAX_CONTEXT if is_dynamic else self.context_length

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def caches(self) -> tuple[CacheShape, ...]:
        """Shapes of the keys and values of each layer with attention."""
        return tuple(self._cache(layer) for layer in self.layers if layer.attends)

    def _cache(self, layer: LayerSpec) -> CacheShape:
        latent = layer.latent
        if latent is None:
            num_kv_heads = self.num_kv_heads if self.cut is None else len(self.cut.kv_heads)
            return CacheShape(num_kv_heads, self.head_dim, self.head_dim, layer.window)
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
    def rotary_dims(self) -> tuple[int, ...]:
        """The dims of each rotary table, and of its copy if heads are padded for the kernels."""
        padded = -(-self.head_dim // 32) * 32
        if all(layer.latent is not None for layer in self.layers):
            padded = 0
        dims = [rope.dim for rope in {layer.rope for layer in self.layers} if rope is not None]
        return tuple(size for dim in dims for size in ((dim,) if padded in (0, dim) else (dim, padded)))


def _check_experts(experts: ExpertsSpec) -> None:
    check(
        1 <= experts.num_experts <= MAX_EXPERTS,
        f"the experts of a layer must be 1..{MAX_EXPERTS}, got {experts.num_experts}",
    )
    check(
        1 <= experts.num_groups <= experts.num_experts and experts.num_experts % experts.num_groups == 0,
        f"groups of experts must divide the {experts.num_experts}, got {experts.num_groups}",
    )
    check(
        1 <= experts.top_groups <= experts.num_groups,
        f"the groups selected per token must be 1..{experts.num_groups}, got {experts.top_groups}",
    )
    most = experts.num_experts // experts.num_groups * experts.top_groups
    check(1 <= experts.top_k <= most, f"the experts of a token must be 1..{most}, got {experts.top_k}")
    low, high = _BOUNDS["intermediate_size"]
    check(
        low <= experts.intermediate_size <= high,
        f"the experts' size must be in {low}..{high}, got {experts.intermediate_size}",
    )
    check(
        0 <= experts.shared_size <= high,
        f"the shared expert's size must be in 0..{high}, got {experts.shared_size}",
    )
    numbers = (experts.eps, experts.scale, experts.jitter, *(experts.clamp or ()))
    check(all(map(math.isfinite, numbers)), f"the numbers of a router must be finite, got {numbers}")


def _check_recurrent(spec: RecurrentSpec) -> None:
    if isinstance(spec, MambaSpec):
        for name in ("num_heads", "head_dim", "num_groups", "state_size"):
            value = getattr(spec, name)
            check(1 <= value <= MAX_STATE, f"a state's {name} must be in 1..{MAX_STATE}, got {value}")
        check_computed(
            spec.head_dim % 16 == 0, f"a state's heads must be multiples of 16 wide, got {spec.head_dim}"
        )
        check(
            spec.num_heads % spec.num_groups == 0,
            f"the groups of a state must divide its {spec.num_heads} heads, got {spec.num_groups}",
        )
        _check_factors("the factors of a state", spec.factors)
        low, high = spec.dt_limit
        check(0 <= low <= high and low < math.inf, f"time steps cannot be clamped to {low}..{high}")
    if isinstance(spec, GatedDeltaSpec):
        for name in ("num_heads", "head_dim", "num_key_heads", "key_dim"):
            value, most = getattr(spec, name), MAX_KEY_DIM if name == "key_dim" else MAX_STATE
            check_computed(1 <= value <= most, f"a delta net's {name} must be in 1..{most}, got {value}")
        check_computed(
            spec.head_dim % 16 == 0, f"a delta net's heads must be multiples of 16 wide, got {spec.head_dim}"
        )
        check(
            spec.num_heads % spec.num_key_heads == 0,
            f"the key heads of a delta net must divide its {spec.num_heads} heads, got {spec.num_key_heads}",
        )
    low, high = _BOUNDS["hidden_size"]
    check(
        low <= spec.num_channels <= high,
        f"the channels of a convolution must be in {low}..{high}, got {spec.num_channels}",
    )
    check_computed(
        2 <= spec.num_taps <= MAX_TAPS,
        f"the tokens in a convolution must be 2..{MAX_TAPS}, got {spec.num_taps}",
    )


def _check_factors(what: str, factors: Sequence[float]) -> None:
    check(all(0 < each < math.inf for each in factors), f"{what} must be positive, got {factors}")


def check_scaling(scaling: RopeScaling) -> None:
    """Check the bounds of a rotary scaling."""
    check(1.0 <= scaling.factor <= 1e6, f"the rope scaling factor must be in 1..1e6, got {scaling.factor}")
    check(
        0 < scaling.low_freq_factor < scaling.high_freq_factor < 1e6,
        "rope scaling needs 0 < low_freq_factor < high_freq_factor",
    )
    check(
        # Kimi K2's are equal.
        0 < scaling.beta_slow <= scaling.beta_fast < 1e6 and 0 < scaling.attention_factor < 1e6,
        "rope scaling needs 0 < beta_slow <= beta_fast and a positive attention_factor",
    )
    check(
        2 <= scaling.original_context <= MAX_CONTEXT,
        f"original_max_position_embeddings must be in 2..{MAX_CONTEXT}, got {scaling.original_context}",
    )
    for factors in (scaling.short_factors, scaling.long_factors):
        check(
            factors is None or all(math.isfinite(f) and f > 0 for f in factors),
            "longrope's factors must be positive",
        )


def check_computed(holds: bool, message: str) -> None:
    """Refuse to compute a model natively, for this reason; the code of `transformers` may still run it."""
    if not holds:
        raise NotInFamily(message)
