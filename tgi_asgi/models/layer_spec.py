"""What a layer computes: attention, rotary embedding, experts. `config_bounds.py` checks the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tgi_asgi.models.latent_spec import LatentSpec
from tgi_asgi.models.recurrent_specs import HybridSpec, RecurrentSpec


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
    # Proportional, if not None: this is the head size; its halves begin with the dims that rotate, so that
    # dim i rotates together with i + whole_dim / 2. Frequencies are those of a whole head's first pairs.
    whole_dim: int | None = None

    @property
    def width(self) -> int:
        """The dims by which frequencies fall from 1 to 1 / theta."""
        return self.dim if self.whole_dim is None else self.whole_dim


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
    has_scales: bool = False  # whether a factor per expert scales its weight
    has_gate: bool = True  # whether experts compute f(gate) * up, and the shared MLP too, instead of f(up)
    latent_size: int = 0  # width of experts' inputs and results, if a product leads there and back; 0: hidden


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Queries at position p are multiplied by 1 + beta * ln(1 + p // period) (Llama 4, Ministral 3)."""

    beta: float
    period: int


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Where images' rows enter a model: in place of their tokens' embeddings, and perhaps deeper.

    Attributes:
        deep_layers: Layers before which further rows are added, one for each of an image's deeper levels.
        sees_ahead: Whether tokens of an image see later ones.
    """

    deep_layers: tuple[int, ...] = ()
    sees_ahead: bool = False


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes that a layer has instead of the model's."""

    num_kv_heads: int
    head_dim: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer: its attention, or what replaces it, and its experts, if it has any.

    In a layer without attention the attention fields are ignored.
    """

    rope: RopeSpec | None  # None: no rotation
    window: int | None  # positions a query attends to, its own included; None: all
    scale: float  # factor on the attention scores
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)
    slopes: tuple[float, ...] | None = None  # per head: ALiBi bias per position
    has_sinks: bool = False  # whether each head has an attention sink
    query_growth: QueryGrowth | None = None
    alphas: tuple[float, float] | None = None  # xIELU's two parameters, if the configuration has them
    experts: ExpertsSpec | None = None  # most families' replace the MLP
    recurrent: RecurrentSpec | None = None  # replaces attention
    hybrid: HybridSpec | None = None  # the layer has both attention and a recurrent part, in parallel
    latent: LatentSpec | None = None  # latent attention (MLA), if the layer uses it
    sizes: LayerSizes | None = None  # None: the model's
    keys_of: int | None = None  # the earlier layer whose keys and values are read; None: the layer's own
    sees_ahead: bool = True  # whether the tokens of an image see each other, if they do in any layer
    values_are_keys: bool = False  # whether values are computed as keys are, up to their norm
    # The only part that the layer has: "mixer", which is attention or recurrence, or "mlp"; None: both.
    part: Literal["mixer", "mlp"] | None = None

    @property
    def has_mixer(self) -> bool:
        return self.part in (None, "mixer")

    @property
    def attends(self) -> bool:
        return self.has_mixer and (self.recurrent is None or self.hybrid is not None)

    @property
    def has_cache(self) -> bool:
        """Whether the layer has keys and values of its own."""
        return self.attends and self.keys_of is None
