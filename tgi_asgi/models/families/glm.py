"""Zhipu's GLM-4: half of each head rotates, adjacent dims together; gate and up are one tensor.

The models of 2025 (Glm4) have norms before and after each part.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import SANDWICH_NAMES, Family
from tgi_asgi.models.fused import FusedGateUpWeights
from tgi_asgi.models.layers import SandwichLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_glm(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of both; only q, k and v have biases."""
    reader.defaults(
        head_dim=128, attention_bias=True, rms_norm_eps=1.5625e-7, partial_rotary_factor=0.5,
        num_key_value_heads=2,
    )  # fmt: skip
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, has_partial_rotary=True),
        has_interleaved_rope=True,
        **read_biases(reader, qkv="attention_bias"),
        **sizes,
    )


class Glm(Decoder):
    """The decoder with fused gate and up."""

    weights_class = FusedGateUpWeights


class Glm4(Glm):
    """The decoder with norms before and after each part, under Glm4's names."""

    layer_class = SandwichLayer
    checkpoint = CheckpointLayout(
        names={
            "post_attention_layernorm": "post_self_attn_layernorm",
            "pre_feedforward_layernorm": "post_attention_layernorm",
            "post_feedforward_layernorm": "post_mlp_layernorm",
        }
    )


_NAMES = {"mlp.gate_up_proj": "ffn_up"}

FAMILIES = (
    Family("GlmForCausalLM", "chatglm", read_glm, Glm, gguf_names=_NAMES),
    Family("Glm4ForCausalLM", "glm4", read_glm, Glm4, gguf_names={**_NAMES, **SANDWICH_NAMES}),
)
