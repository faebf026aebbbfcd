"""Bounds of the numbers in a model's configuration, which buffers, kernels and limits trust.

`ModelConfig` checks its own numbers and calls `check_layer` when it is made. Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple

from tgi_asgi.errors import NotInFamily, check
from tgi_asgi.models.layer_spec import ExpertsSpec, LayerSizes, LayerSpec, RopeScaling, RopeSpec
from tgi_asgi.models.recurrent_specs import ChannelsSpec, GatedDeltaSpec, MambaSpec, RecurrentSpec

MAX_CONTEXT = 1 << 24
MAX_STRETCH = 1_000_000  # factor by which a scaling of positions extends the context
MAX_HEADS = 1 << 10
MAX_LAYERS = 1 << 10
_MAX_EXPERTS = 1 << 10  # per layer; limit of the kernels
MAX_LABELS = 1 << 16
_MAX_STATE = 1 << 14  # bound of each factor of a recurrent state's size
_MAX_TAPS = 16  # of a short convolution; limit of the kernels
_MAX_KEY_DIM = 256  # of the gated delta rule; limit of the kernels
# Inclusive bounds of every integer: wide enough for any known model, narrow enough that their products fit 64
# bits.
BOUNDS = {
    "vocab_size": (2, 1 << 21),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "num_heads": (1, MAX_HEADS),
    "num_kv_heads": (1, MAX_HEADS),
    "head_dim": (2, 512),  # limit of the attention kernels
    "context_length": (1, MAX_CONTEXT),
}


def check_computed(holds: bool, message: str) -> None:
    """Refuse to compute a model natively, for this reason; the code of `transformers` may still run it."""
    if not holds:
        raise NotInFamily(message)


def check_layer(layer: LayerSpec, num_heads: int, head_dim: int) -> None:
    """Check every number of a layer.

    Raises:
        ModelLoadError: if one is out of bounds or contradicts another.
    """
    _check_attention(layer, num_heads)
    check(layer.part in (None, "mixer", "mlp"), f"a layer's only part cannot be {layer.part!r}")
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
    if layer.sizes is not None:
        _check_sizes(layer.sizes, num_heads)
        head_dim = layer.sizes.head_dim
    if layer.rope is not None:
        _check_rope(layer.rope, head_dim)


def check_shared(layers: Sequence[LayerSpec]) -> None:
    """Check that layers without keys of their own read those of an earlier layer, whose shape they have.

    Raises:
        ModelLoadError: if one does not.
    """
    for index, layer in enumerate(layers):
        if layer.keys_of is None:
            continue
        check(0 <= layer.keys_of < index, f"layer {index} cannot read the keys of layer {layer.keys_of}")
        owner = layers[layer.keys_of]
        check(
            owner.has_cache and (owner.window, _heads_of(owner)) == (layer.window, _heads_of(layer)),
            f"layer {layer.keys_of} has no keys that layer {index} could read",
        )


def _heads_of(layer: LayerSpec) -> tuple[int, int] | None:
    return None if layer.sizes is None else (layer.sizes.num_kv_heads, layer.sizes.head_dim)


def _check_sizes(sizes: LayerSizes, num_heads: int) -> None:
    for name in ("num_kv_heads", "head_dim", "intermediate_size"):
        low, high = BOUNDS[name]
        value = getattr(sizes, name)
        refuse = check_computed if name == "head_dim" else check  # a limit of the native kernels
        refuse(low <= value <= high, f"a layer's {name} must be in {low}..{high}, got {value}")
    check_computed(sizes.head_dim % 2 == 0, f"a layer's head_dim must be even, got {sizes.head_dim}")
    check(
        num_heads % sizes.num_kv_heads == 0,
        f"num_heads ({num_heads}) must be a multiple of a layer's num_kv_heads ({sizes.num_kv_heads})",
    )


def _check_attention(layer: LayerSpec, num_heads: int) -> None:
    check(layer.window is None or layer.window >= 1, f"a window must be positive, got {layer.window}")
    scale, cap, slopes = layer.scale, layer.soft_cap, layer.slopes
    check(math.isfinite(scale) and scale > 0, f"the scale of scores must be positive, got {scale!r}")
    check(cap is None or 0 < cap < math.inf, f"the cap of scores must be positive, got {cap!r}")
    check(
        slopes is None or (len(slopes) == num_heads and all(map(math.isfinite, slopes))),
        f"there must be {num_heads} finite slopes",
    )


def _check_experts(experts: ExpertsSpec) -> None:
    check(
        1 <= experts.num_experts <= _MAX_EXPERTS,
        f"the experts of a layer must be 1..{_MAX_EXPERTS}, got {experts.num_experts}",
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
    low, high = BOUNDS["intermediate_size"]
    check(
        low <= experts.intermediate_size <= high,
        f"the experts' size must be in {low}..{high}, got {experts.intermediate_size}",
    )
    check(
        0 <= experts.shared_size <= high,
        f"the shared expert's size must be in 0..{high}, got {experts.shared_size}",
    )
    check(
        0 <= experts.latent_size <= high,
        f"the width of experts' inputs must be in 0..{high}, got {experts.latent_size}",
    )
    numbers = (experts.eps, experts.scale, experts.jitter, *(experts.clamp or ()))
    check(all(map(math.isfinite, numbers)), f"the numbers of a router must be finite, got {numbers}")


def _check_recurrent(spec: RecurrentSpec) -> None:
    if isinstance(spec, MambaSpec):
        _check_mamba(spec)
    if isinstance(spec, ChannelsSpec):
        _check_channels(spec)
    if isinstance(spec, GatedDeltaSpec):
        _check_gated_delta(spec)
    low, high = BOUNDS["hidden_size"]
    check(
        low <= spec.num_channels <= high,
        f"the channels of a convolution must be in {low}..{high}, got {spec.num_channels}",
    )
    check_computed(
        2 <= spec.num_taps <= _MAX_TAPS,
        f"the tokens in a convolution must be 2..{_MAX_TAPS}, got {spec.num_taps}",
    )


def _check_mamba(spec: MambaSpec) -> None:
    for name in ("num_heads", "head_dim", "num_groups", "state_size"):
        value = getattr(spec, name)
        check(1 <= value <= _MAX_STATE, f"a state's {name} must be in 1..{_MAX_STATE}, got {value}")
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


def _check_channels(spec: ChannelsSpec) -> None:
    for name in ("state_size", "rank"):
        value = getattr(spec, name)
        check(1 <= value <= _MAX_STATE, f"a channel's {name} must be in 1..{_MAX_STATE}, got {value}")
    check_computed(spec.width % 16 == 0, f"channels with states must be multiples of 16, got {spec.width}")
    eps = spec.norm_eps
    check(eps is None or 0 < eps < math.inf, f"the norms of a state need a positive epsilon, got {eps}")


def _check_gated_delta(spec: GatedDeltaSpec) -> None:
    for name in ("num_heads", "head_dim", "num_key_heads", "key_dim"):
        value, most = getattr(spec, name), _MAX_KEY_DIM if name == "key_dim" else _MAX_STATE
        check_computed(1 <= value <= most, f"a delta net's {name} must be in 1..{most}, got {value}")
    check_computed(
        spec.head_dim % 16 == 0, f"a delta net's heads must be multiples of 16 wide, got {spec.head_dim}"
    )
    check(
        spec.num_heads % spec.num_key_heads == 0,
        f"the key heads of a delta net must divide its {spec.num_heads} heads, got {spec.num_key_heads}",
    )


def _check_factors(what: str, factors: Sequence[float]) -> None:
    check(all(0 < each < math.inf for each in factors), f"{what} must be positive, got {factors}")


def _check_rope(rope: RopeSpec, head_dim: int) -> None:
    # transformers rounds an odd size up, in some architectures.
    check_computed(rope.dim % 2 == 0, f"the rotary size must be even, got {rope.dim}")
    check(
        2 <= rope.dim <= head_dim,
        f"the rotary size must be in 2..{head_dim}, the head size, got {rope.dim}",
    )
    check(
        rope.whole_dim in (None, head_dim),
        f"pairs are apart by half a head of {head_dim}, not of {rope.whole_dim}",
    )
    check(math.isfinite(rope.theta) and rope.theta > 0, f"rope_theta must be positive, got {rope.theta!r}")
    scaling = rope.scaling
    if scaling is None:
        return
    check(scaling.kind != "yarn" or rope.theta > 1, f"yarn needs rope_theta above 1: {rope.theta}")
    check(scaling.kind != "dynamic" or rope.dim > 2, "dynamic scaling needs more than 2 rotary dims")
    _check_scaling(scaling)
    for factors in (scaling.short_factors, scaling.long_factors):
        check(
            factors is None or len(factors) == rope.dim // 2,
            f"longrope needs {rope.dim // 2} factors, got {len(factors or ())}",
        )


def _check_scaling(scaling: RopeScaling) -> None:
    check(
        1.0 <= scaling.factor <= MAX_STRETCH,
        f"the rope scaling factor must be in 1..{MAX_STRETCH}, got {scaling.factor}",
    )
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
