"""The rotary tables of a model: frequencies as in `transformers`, but powers rounded once, from float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tgi_asgi import ops
from tgi_asgi.errors import check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import MAX_CONTEXT
from tgi_asgi.models.layer_spec import QueryGrowth, RopeScaling, RopeSpec
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.reading_rope import yarn_magnitude
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.settings import GivenRope


class RopeTables:
    """One table per rotary embedding of the layers, and one per query growth.

    A GGUF file stores llama3's and longrope's scaling as tensors of divisors. longrope's divisors and dynamic
    scaling's base depend on the context; both are chosen once, for the longest context served. Cached keys
    and queries are then rotated by the same table, and a text does not depend on other requests.
    """

    def __init__(self, config: ModelConfig, weights: Weights, max_positions: int) -> None:
        self._tables: dict[RopeSpec, ops.RopeTable] = {}
        for spec in {layer.rope for layer in config.layers if layer.rope is not None}:
            divisors = _divisors(spec, weights, max_positions)
            scale = 1.0 if spec.scaling is None else spec.scaling.attention_factor
            inverse = inverse_frequencies(spec, divisors, max_positions).tolist()
            self._tables[spec] = ops.RopeTable.create(inverse, max_positions, scale=scale)
        growths = {layer.query_growth for layer in config.layers if layer.query_growth is not None}
        self._growths = {growth: _query_scales(growth, max_positions) for growth in growths}

    def table(self, spec: RopeSpec | None) -> ops.RopeTable | None:
        """Return a layer's table; None if it does not rotate."""
        return None if spec is None else self._tables[spec]

    def query_scales(self, growth: QueryGrowth | None) -> Floats | None:
        """Return a layer's factors on queries, [positions] float32; None: no factors."""
        return None if growth is None else self._growths[growth]


def _query_scales(growth: QueryGrowth, max_positions: int) -> Floats:
    turns = np.floor(np.arange(max_positions, dtype=np.float32) / np.float32(growth.period))
    scales: Floats = (1 + growth.beta * np.log(1 + turns)).astype(np.float32)
    return scales


def _divisors(spec: RopeSpec, weights: Weights, max_positions: int) -> Floats | None:
    """Return the divisors of the frequencies, [dim / 2] float32, if a list or a tensor has them."""
    scaling = spec.scaling
    if scaling is not None and scaling.is_override:
        for name in ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"):
            if name in weights:
                weights.get(name, (spec.dim // 2,))  # mark it as read, but do not apply it
        return None
    if scaling is not None and scaling.kind == "longrope":
        is_long = max_positions > scaling.original_context
        listed = scaling.long_factors if is_long else scaling.short_factors
        if listed is not None:
            return np.array(listed, np.float32)
        both = [
            ops.vector(weights.get(f"rope_factors_{name}.weight", (spec.dim // 2,)))
            for name in ("short", "long")
        ]
        return both[is_long]
    if "rope_freqs.weight" in weights:
        return ops.vector(weights.get("rope_freqs.weight", (spec.dim // 2,)))
    return None


def inverse_frequencies(spec: RopeSpec, divisors: Floats | None = None, max_positions: int = 0) -> Floats:
    """Return the angle of each pair per position: [dim / 2] float32.

    Args:
        max_positions: The context served, which dynamic scaling depends on.
    """
    if spec.frequencies is not None:
        return np.array(spec.frequencies, np.float32)
    exponents = np.arange(0, spec.dim, 2, dtype=np.float32) / np.float32(spec.width)
    powers = _power(_base(spec, max_positions), exponents)
    if divisors is not None:
        powers = divisors * powers
    inverse = 1.0 / powers
    scaling = spec.scaling
    if scaling is None or scaling.kind in ("dynamic", "longrope"):
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    return _scale_llama3(inverse, scaling) if scaling.kind == "llama3" else _scale_yarn(powers, spec, scaling)


def _power(base: float, exponents: Floats) -> Floats:
    """Return base ** exponents, rounded once."""
    found: Floats = np.power(base, exponents.astype(np.float64)).astype(np.float32)
    return found


def _base(spec: RopeSpec, max_positions: int) -> float:
    """Return theta; with dynamic scaling, increased with the context so that the slowest pair rotates as far.

    Source: "Dynamically Scaled RoPE", NTK-aware, as in `transformers`.
    """
    scaling = spec.scaling
    if scaling is None or scaling.kind != "dynamic":
        return spec.theta
    length = max(max_positions, scaling.original_context)
    stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
    return float(spec.theta * stretch ** (spec.width / (spec.width - 2)))


def scale_positions(config: ModelConfig, rope: GivenRope) -> ModelConfig:
    """Return a configuration with this position scaling instead of its own, and the resulting context.

    If layers have several rotary embeddings, those of layers without a window are scaled.

    Raises:
        ModelLoadError: if the model has no rotary embedding.
    """
    ropes = {layer.rope for layer in config.layers if layer.rope is not None}
    if len(ropes) > 1:
        ropes = {layer.rope for layer in config.layers if layer.rope and layer.window is None} or ropes
    check(bool(ropes), f"--rope-scaling: {config.architecture} has no rotary embedding to scale")
    contexts = [
        spec.scaling.original_context
        for spec in ropes
        if spec.scaling is not None and spec.scaling.kind != "linear"
    ]
    context = min(contexts, default=config.context_length)
    factor, magnitude = rope.factor, yarn_magnitude(rope.factor) if rope.kind == "yarn" else 1.0
    kind = "linear" if rope.kind == "none" else rope.kind
    scaling = RopeScaling(kind, factor, context, attention_factor=magnitude, is_override=True)
    layers = tuple(
        replace(layer, rope=replace(layer.rope, scaling=scaling)) if layer.rope in ropes else layer
        for layer in config.layers
    )
    return replace(config, layers=layers, context_length=int(context * factor))


def stretch_context(config: ModelConfig) -> ModelConfig:
    """Return a checkpoint's configuration with the context to which its position scaling extends.

    Model cards (Qwen 2.5, Vicuna 16K) say to add a linear or YaRN scaling and to leave
    `max_position_embeddings` as it is; vLLM serves the product, too. A configuration that already names a
    longer context keeps it. Not stretched are scalings that apply to some layers only, whose files (Gemma 3,
    OLMo 3) name the final context, and dynamic ones, which would change the texts that need no scaling.
    """
    scalings = {layer.rope.scaling for layer in config.layers if layer.rope is not None}
    scaling = scalings.pop() if len(scalings) == 1 else None
    if scaling is None or scaling.kind not in ("linear", "yarn"):
        return config
    original = scaling.original_context if scaling.kind == "yarn" else config.context_length
    context = min(int(original * scaling.factor), MAX_CONTEXT)
    return replace(config, context_length=max(config.context_length, context))


def _scale_llama3(inverse: Floats, scaling: RopeScaling) -> Floats:
    """Divide the frequencies of long wavelengths by the factor, keep short ones, and interpolate in between.

    Source: `apply_scaling` of Llama 3.1's reference code.
    """
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    with np.errstate(divide="ignore", invalid="ignore"):  # equal factors leave nothing to interpolate
        smooth = (scaling.original_context / wavelength - low) / np.float32(high - low)
        blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    scaled = np.where(wavelength > scaling.original_context / low, inverse / scaling.factor, blended)
    found: Floats = np.where(wavelength < scaling.original_context / high, inverse, scaled)
    return found


def _scale_yarn(powers: Floats, spec: RopeSpec, scaling: RopeScaling) -> Floats:
    """Stretch pairs with under `beta_slow` turns in the original context; keep those from `beta_fast` on.

    Source: Peng et al., YaRN, arXiv 2309.00071, section 3.2.
    """

    def pair_of(num_turns: float) -> float:
        turns = scaling.original_context / (num_turns * 2 * math.pi)
        return spec.width * math.log(turns) / (2 * math.log(spec.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((np.arange(spec.dim // 2, dtype=np.float32) - low) / (high - low)).clip(0, 1)
    kept = 1 - ramp
    stretched: Floats = 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
    return stretched
