"""Names what a model needs from a device beyond the operators that every family uses. Without torch.

A device lists those that it supports, so that a model is refused before any weight is read.
"""

from __future__ import annotations

import enum

from tgi_asgi.models.config import ModelConfig


class Need(enum.StrEnum):
    """One thing that a model may need, as worded in messages."""

    LAYER_NORM = "LayerNorm"
    PLAIN_MLP = "MLPs without a gate"
    GATES = "gates by other functions than silu and gelu_tanh"
    LEARNED_POSITIONS = "learned positions"
    INTERLEAVED_ROPE = "rotary embeddings of neighbouring dims"
    PROPORTIONAL_ROPE = "proportional rotary embeddings"
    CLIP = "queries, keys and values that are cut to a range"
    QK_LAYER_NORM = "LayerNorm of queries and keys"
    QUERY_SCALES = "queries that grow with their positions"
    LATE_QK_NORM = "norms of rotated queries and keys"
    WINDOWS = "windows that differ between layers"
    SOFT_CAP = "soft caps of scores"
    SLOPES = "ALiBi"
    SINKS = "attention sinks"
    OUTPUT_GATES = "gated attention outputs"
    EXPERTS = "routed experts"
    STATES = "recurrent layers"
    LATENTS = "latent attention"
    LAYER_SIZES = "layers of several shapes"
    SHARED_KEYS = "layers that share keys and values"
    LAYER_INPUTS = "embeddings of each layer"
    VALUE_NORM = "norms of values"
    ONE_PART = "layers without attention or without an MLP"
    IMAGES = "images"
    LOOKAHEAD = "tokens of images that see later ones"


def needs_of(config: ModelConfig) -> set[Need]:
    """Return what a model needs."""
    layers = config.layers
    found = {
        Need.LAYER_NORM: config.has_layer_norm,
        Need.PLAIN_MLP: not config.has_gate,
        Need.GATES: config.has_gate and config.activation not in ("silu", "gelu_tanh"),
        Need.LEARNED_POSITIONS: config.has_learned_positions,
        Need.INTERLEAVED_ROPE: config.has_interleaved_rope,
        Need.PROPORTIONAL_ROPE: any(layer.rope and layer.rope.whole_dim is not None for layer in layers),
        Need.CLIP: config.clip is not None,
        Need.QK_LAYER_NORM: config.has_qk_norm and config.has_layer_norm,
        Need.QUERY_SCALES: any(layer.query_growth is not None for layer in layers),
        Need.LATE_QK_NORM: config.has_qk_norm and config.has_late_qk_norm,
        Need.WINDOWS: len({layer.window for layer in layers}) > 1,
        Need.SOFT_CAP: any(layer.soft_cap is not None for layer in layers),
        Need.SLOPES: any(layer.slopes is not None for layer in layers),
        Need.SINKS: any(layer.has_sinks for layer in layers),
        Need.OUTPUT_GATES: config.has_output_gate or config.has_head_gates,
        Need.EXPERTS: any(layer.experts is not None for layer in layers),
        Need.STATES: config.has_states,
        Need.LATENTS: any(layer.latent is not None for layer in layers),
        Need.LAYER_SIZES: any(layer.sizes is not None for layer in layers),
        Need.SHARED_KEYS: any(layer.keys_of is not None for layer in layers),
        Need.LAYER_INPUTS: config.layer_input_size > 0,
        Need.VALUE_NORM: config.has_value_norm,
        Need.ONE_PART: any(layer.part is not None for layer in layers),
        Need.IMAGES: config.images is not None,
        Need.LOOKAHEAD: config.images is not None and config.images.sees_ahead,
    }
    return {need for need, is_needed in found.items() if is_needed}
