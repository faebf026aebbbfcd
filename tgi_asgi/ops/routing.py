"""Parameters of routed experts: how a token's are chosen and weighted, and their clamped gates."""

from __future__ import annotations

from dataclasses import dataclass, field

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Floats


@dataclass(frozen=True, eq=False, slots=True)
class RouteSpec:
    """How a token's experts are chosen and weighted.

        RouteSpec(64, 8)                                             # softmax, the eight best (OLMoE)
        RouteSpec(128, 8, is_renormalised=True, expert_scales=scales)  # Gemma 4
        RouteSpec(128, 8, "sigmoid", correction=bias, eps=1e-20, is_renormalised=True, scale=2.5)  # GLM 4.5

    If scores are equal, the expert with the lower index is chosen.

    Attributes:
        num_experts, top_k: Number of experts of the layer, and of a token.
        kind: Function from logits to scores: `softmax`, `sigmoid`, or `sparsemixer`, the softmax over the
            experts not yet chosen whose logits are near the best one's (Phi 3.5 MoE; Liu et al., arXiv
            2409.12136).
        correction: float32 [num_experts], added to the scores for the selection, not to the weights (Wang et
            al., Auxiliary-Loss-Free Load Balancing, arXiv 2408.15664).
        num_groups: Number of groups of consecutive experts; experts are chosen only from the best
            `top_groups` (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
        sums_top_two: Whether a group's score is the sum of its two best experts' scores, not its best
            expert's score.
        is_renormalised: Whether a token's weights are divided by their sum plus `eps`.
        scale: Factor on the weights, applied after renormalisation.
        jitter: For `sparsemixer`: logits count as near if their relative distance is at most twice this.
        expert_scales: float32 [num_experts], another factor on the weight of each expert, applied last. CPUs
            only.

    Raises:
        ValueError: if a number is out of range or not finite, a vector has another size, or groups do not
            divide the experts.
        TypeError: if `correction` or `expert_scales` is not float32.
    """

    num_experts: int
    top_k: int
    kind: str = "softmax"
    correction: Floats | None = None
    num_groups: int = 1
    top_groups: int = 1
    sums_top_two: bool = False
    is_renormalised: bool = False
    eps: float = 0.0
    scale: float = 1.0
    jitter: float = 0.01
    expert_scales: Floats | None = None
    native: _C.RouteSpec = field(init=False, repr=False)

    def __post_init__(self) -> None:
        native = _C.RouteSpec(
            num_experts=self.num_experts, top_k=self.top_k, kind=self.kind, correction=self.correction,
            num_groups=self.num_groups, top_groups=self.top_groups, sums_top_two=self.sums_top_two,
            is_renormalised=self.is_renormalised, eps=self.eps, scale=self.scale, jitter=self.jitter,
            expert_scales=self.expert_scales,
        )  # fmt: skip
        object.__setattr__(self, "native", native)


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """A silu-like gate on clamped values: g * sigmoid(slope * g) * (up + offset), with g = min(gate, limit).

    `up` is clamped on both sides. gpt-oss has 7, 1.702 and 1 (its model card, arXiv 2508.10925).
    """

    limit: float
    slope: float = 1.0
    offset: float = 0.0
