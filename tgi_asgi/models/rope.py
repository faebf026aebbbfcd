"""The rotary table of a model: frequencies in float32, step by step as `transformers` computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig, RopeScaling
from tgi_asgi.models.loading import Weights


def make_rope_table(config: ModelConfig, weights: Weights, max_positions: int) -> ops.RopeTable:
    """Build the table; a GGUF file keeps llama3's scaling as divisors of its own, `rope_freqs.weight`."""
    factors = None
    if "rope_freqs.weight" in weights:
        factors = ops.vector(weights.get("rope_freqs.weight", (config.head_dim // 2,)))
    return ops.RopeTable.create(inverse_frequencies(config, factors).tolist(), max_positions)


def inverse_frequencies(config: ModelConfig, factors: Tensor | None = None) -> Tensor:
    """Return what a position is multiplied by to give each pair's angle: [head_dim / 2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    if factors is not None:
        inverse = inverse / factors
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    return inverse / scaling.factor if scaling.kind == "linear" else _scale_llama3(inverse, scaling)


def _scale_llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch long wavelengths by the factor, keep short ones, and go smoothly from one to the other.

    Source: `apply_scaling` of Llama 3.1's reference code.
    """
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    scaled = torch.where(wavelength > scaling.original_context / low, inverse / scaling.factor, blended)
    return torch.where(wavelength < scaling.original_context / high, inverse, scaled)
