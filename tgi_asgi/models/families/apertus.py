"""Apertus of the Swiss AI Initiative: norms per head, and an MLP of xIELU with two learned parameters.

Source: Project Apertus, arXiv 2509.14233, section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tgi_asgi import ops
from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.layers import Layer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_rope import default_rope
from tgi_asgi.models.rope import RopeTables

_BETA = 0.5  # xIELU's factor on x; no file has another
_ROPE = {
    "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


def read_apertus(reader: Reader, architecture: str) -> ModelConfig:
    """Read Apertus's configuration; llama.cpp's files have xIELU's parameters in the metadata."""
    reader.defaults(rms_norm_eps=1e-5, rope_theta=12e6)
    default_rope(reader, _ROPE)
    reader.require(qk_norm=True, post_norm=False)  # in published files; transformers reads neither
    sizes = read_sizes(reader, activation="xielu")
    layers = read_layers(reader, sizes)
    return ModelConfig(
        architecture=architecture,
        layers=_with_alphas(reader, layers) if reader.is_gguf else layers,
        has_gate=False,
        has_qk_norm=True,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


def _with_alphas(reader: Reader, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    listed = []
    for name in ("alpha_p", "alpha_n", "beta"):
        values = reader.get(f"xielu.{name}")
        values = values if isinstance(values, (list, tuple)) else [values] * len(layers)
        check(
            len(values) == len(layers) and all(type(value) is float for value in values),
            f"xielu.{name} must be {len(layers)} numbers",
        )
        listed.append(values)
    reader.ignore("xielu.eps")
    check(all(abs(beta - _BETA) < 1e-6 for beta in listed[2]), f"xielu.beta must be {_BETA}")
    return tuple(
        replace(layer, alphas=alphas)
        for layer, alphas in zip(layers, zip(*listed[:2], strict=True), strict=True)
    )


class ApertusLayer(Layer):
    """A layer with xIELU's parameters, which are the softplus of the stored values."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, index: int, ropes: RopeTables) -> None:
        super().__init__(config, weights, index, ropes)
        found = self.spec.alphas
        if found is None and config.activation == "xielu":
            names = ("alpha_p", "alpha_n", "beta")
            above, below, beta = (
                ops.vector(weights.get(f"mlp.act_fn.{name}", *([1] if name != "beta" else []))).item()
                for name in names
            )
            check(abs(beta - _BETA) < 1e-6, f"xIELU's beta must be {_BETA}, got {beta}")
            found = (above, below)
        if found is not None:
            self.alphas = (_softplus(found[0]), _BETA + _softplus(found[1]))


def _softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


class Apertus(Decoder):
    """The decoder with Apertus's layers and names of norms."""

    layer_class = ApertusLayer
    checkpoint = CheckpointLayout(
        names={
            "input_layernorm": "attention_layernorm",
            "post_attention_layernorm": "feedforward_layernorm",
        }
    )


FAMILIES = (
    Family(
        "ApertusForCausalLM",
        "apertus",
        read_apertus,
        Apertus,
        unused=("*.rotary_emb.inv_freq", "*.mlp.act_fn.eps"),
    ),
)
