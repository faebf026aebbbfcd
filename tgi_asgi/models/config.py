"""What a model looks like: one validated value, which a family reads from a config.json or a GGUF file.

Everything downstream (buffers, kernels, limits) trusts these numbers, so each is bounded here. Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Protocol

from tgi_asgi.errors import ModelLoadError, NotInFamily
from tgi_asgi.models.latent_spec import LatentSpec
from tgi_asgi.models.recurrent_specs import GatedDeltaSpec, HybridSpec, MambaSpec, RecurrentSpec
from tgi_asgi.models.shard import ModelCut

MAX_CONTEXT = 1 << 24

# Inclusive bounds of every integer: wide enough for any model known, narrow enough that products of them
# stay within 64 bits.
_BOUNDS = {
    "vocab_size": (2, 1 << 21),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "num_heads": (1, 1 << 10),
    "num_kv_heads": (1, 1 << 10),
    "head_dim": (2, 256),  # what the attention kernels have
    "context_length": (1, MAX_CONTEXT),
}
MAX_LAYERS = 1 << 10
MAX_EXPERTS = 1 << 10  # of a layer, as the kernels have it
MAX_LABELS = 1 << 16
MAX_STATE = 1 << 14  # of what a recurrent layer's state is the product of
MAX_TAPS = 16  # of a short convolution, as the kernels have it
MAX_KEY_DIM = 256  # of the gated delta rule, as the kernels have it


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
    attention_factor: float = 1.0  # yarn and longrope: what cosines and sines are multiplied by
    # longrope: divisors of each frequency up to the original context, and beyond; None: a GGUF file has them
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    is_given: bool = False  # by the operator: what a GGUF file's tensors say of it is passed over


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A rotary embedding: dims [0, dim) of each head turn, dim i with i + dim / 2."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None
    frequencies: tuple[float, ...] | None = None  # of each pair, where no formula gives them


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """The experts of a layer, and how tokens are routed to them: `ops.RouteSpec` has the words."""

    num_experts: int
    top_k: int  # of a token
    intermediate_size: int
    kind: str = "softmax"
    has_correction: bool = False  # numbers that are added to scores for the choice alone
    num_groups: int = 1
    top_groups: int = 1
    adds_two_best: bool = False
    is_renormalised: bool = False
    eps: float = 0.0
    scale: float = 1.0
    jitter: float = 0.01
    has_bias: bool = False  # of the router, and of the experts' products
    clamp: tuple[float, float, float] | None = None  # limit, slope and offset of gates (gpt-oss)
    shared_size: int = 0  # of an MLP beside them that all tokens have; 0: there is none
    has_shared_gate: bool = False  # a token says how much it wants of that


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Queries at position p are multiplied by 1 + beta * ln(1 + p // period) (Llama 4, Ministral 3)."""

    beta: float
    period: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer is: its attention, and experts where it has them in the place of an MLP.

    Of a layer that does not attend nothing counts that is said of attention.
    """

    rope: RopeSpec | None  # None: nothing is rotated
    window: int | None  # a query sees so many positions, its own included; None: all
    scale: float  # what scores are multiplied by
    chunk: int | None = None  # a query sees those of its own chunk of so many positions
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)
    slopes: tuple[float, ...] | None = None  # of each head: what a position adds to scores (ALiBi)
    has_sinks: bool = False  # each head has a score that takes part in the sum of weights alone
    query_growth: QueryGrowth | None = None
    alphas: tuple[float, float] | None = None  # xIELU's two numbers, where the configuration has them
    experts: ExpertsSpec | None = None
    recurrent: RecurrentSpec | None = None  # what it has in the place of attention
    hybrid: HybridSpec | None = None  # it has both, side by side
    latent: LatentSpec | None = None  # how keys and values are made, where that is of latents

    @property
    def attends(self) -> bool:
        return self.recurrent is None or self.hybrid is not None


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One layer's keys and values, and for how long a sequence needs them."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None  # positions before this many, a token's own included, are never read again
    is_latent: bool = False  # one head, whose values are its keys' first dims


class StateShape(Protocol):
    """What a recurrent layer keeps of a sequence; `ops.StateShape` has the words."""

    @property
    def num_channels(self) -> int: ...
    @property
    def num_taps(self) -> int: ...
    @property
    def num_floats(self) -> int: ...


class ServedConfig(Protocol):
    """What the runner must know of a model, whoever computes it."""

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
        """What may be asked for beyond `context_length`, which is what there is unless it is asked for."""

    @property
    def generates(self) -> bool:
        """Whether the model gives text."""

    @property
    def num_labels(self) -> int:
        """Those of a classifier; 0: it is none."""

    @property
    def caches(self) -> Sequence[CacheShape]:
        """The keys and values of each layer that has any."""

    @property
    def other_bytes_per_token(self) -> int:
        """What a token takes beside them."""

    @property
    def states(self) -> Sequence[StateShape]:
        """What each layer that is recurrent keeps of a sequence."""

    @property
    def other_state_bytes(self) -> int:
        """What a sequence takes beside them, however long it is."""

    @property
    def rotary_dims(self) -> Sequence[int]:
        """The dims of the rotary tables that are made for every position."""

    @property
    def has_states(self) -> bool:
        """A sequence has more than keys and values: from these alone nothing can go on."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder-only transformer.

    Raises:
        ModelLoadError: a number is out of bounds or contradicts another.
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
    has_output_gate: bool = False  # heads' results are multiplied by the sigmoid of as many gates
    has_mlp_bias: bool = False
    has_gate: bool = True  # an MLP is f(gate) * up, not f(up)
    is_parallel: bool = False  # attention and MLP read the residual as it comes to the layer
    has_mlp_norm: bool = True  # False: the MLP reads the norm that attention reads
    has_qk_norm: bool = False  # queries and keys are normalised before they are rotated
    has_late_qk_norm: bool = False  # once they are rotated
    has_interleaved_rope: bool = False  # dims 2i and 2i + 1 turn together
    has_learnt_positions: bool = False  # a table has what each position adds to the embedding
    has_layer_norm: bool = False  # norms are LayerNorms
    has_norm_weight: bool = True
    has_norm_bias: bool = False
    norm_offset: float = 0.0  # what is added to the norms' weights
    clip: float | None = None  # q, k and v are cut to [-clip, clip]
    has_tied_embeddings: bool = False  # the head is the embedding
    has_head_bias: bool = False
    embedding_factor: float = 1.0  # on the embedding
    residual_factor: float = 1.0  # on what a layer's parts add to the residual
    logits_scale: float = 1.0
    logits_cap: float = 0.0  # logits become cap * tanh(logit / cap); 0: they do not
    has_head: bool = True  # False: the embedding stands in for a head that there is not
    num_labels: int = 0  # of a classifier, whose head has a row for each; 0: it is none
    cut: ModelCut | None = None  # what this process computes of it; None: all

    @property
    def generates(self) -> bool:
        """Whether the model gives text."""
        return self.has_head and not self.num_labels

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            refuse = check_computed if name == "head_dim" else check  # a limit of our kernels
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
            f"what q, k and v are cut to must be positive, got {self.clip!r}",
        )
        check_computed(not self.has_gate or self.activation != "xielu", "xielu is of MLPs without a gate")
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
        check(
            rope.dim % 2 == 0 and 2 <= rope.dim <= self.head_dim,
            f"the rotary size must be even and at most the head size {self.head_dim}, got {rope.dim}",
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
        """Any, where the rotary table is made for the context that is served."""
        ropes = [layer.rope for layer in self.layers if layer.rope is not None]
        is_dynamic = any(rope.scaling is not None and rope.scaling.kind == "dynamic" for rope in ropes)
        return MAX_CONTEXT if is_dynamic else self.context_length

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def caches(self) -> tuple[CacheShape, ...]:
        """The keys and values of each layer that attends: all have one shape."""
        return tuple(self._cache(layer) for layer in self.layers if layer.attends)

    def _cache(self, layer: LayerSpec) -> CacheShape:
        latent = layer.latent
        if latent is None:
            num_kv_heads = self.num_kv_heads if self.cut is None else len(self.cut.kv_heads)
            return CacheShape(num_kv_heads, self.head_dim, self.head_dim, layer.window)
        return CacheShape(1, latent.rank + latent.rotary_dim, latent.rank, layer.window, is_latent=True)

    @property
    def states(self) -> tuple[RecurrentSpec, ...]:
        """What each recurrent layer keeps."""
        return tuple(layer.recurrent for layer in self.layers if layer.recurrent is not None)

    @property
    def has_states(self) -> bool:
        return bool(self.states)

    @property
    def other_bytes_per_token(self) -> int:
        return 0

    @property
    def other_state_bytes(self) -> int:
        return 0

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """The dims of each rotary table, and of its copy where heads are padded for the kernels."""
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
        f"the groups that are chosen from must be 1..{experts.num_groups}, got {experts.top_groups}",
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
        check(0 <= low <= high and low < math.inf, f"steps cannot be cut to {low}..{high}")
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
        f"the tokens that a convolution goes over must be 2..{MAX_TAPS}, got {spec.num_taps}",
    )


def _check_factors(what: str, factors: Sequence[float]) -> None:
    check(all(0 < each < math.inf for each in factors), f"{what} must be positive, got {factors}")


def check_scaling(scaling: RopeScaling) -> None:
    """Bound the numbers of a rotary scaling."""
    check(1.0 <= scaling.factor <= 1e6, f"the rope scaling factor must be in 1..1e6, got {scaling.factor}")
    check(
        0 < scaling.low_freq_factor < scaling.high_freq_factor < 1e6,
        "rope scaling needs 0 < low_freq_factor < high_freq_factor",
    )
    check(
        0 < scaling.beta_slow < scaling.beta_fast < 1e6 and 0 < scaling.attention_factor < 1e6,
        "rope scaling needs 0 < beta_slow < beta_fast and a positive attention_factor",
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


def check(holds: bool, message: str) -> None:
    """Refuse a model for this reason."""
    if not holds:
        raise ModelLoadError(message)


def check_computed(holds: bool, message: str) -> None:
    """Refuse to compute a model by a family of ours, for this reason: the code of `transformers` may."""
    if not holds:
        raise NotInFamily(message)
