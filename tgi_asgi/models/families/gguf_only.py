"""StarCoder 1, Jais 2 and DBRX: native for GGUF files; checkpoints run on the code of `transformers`.

Their norms are LayerNorms.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts


def read_starcoder(reader: Reader, architecture: str) -> ModelConfig:
    """Read StarCoder 1's configuration: GPT-2 with one KV head."""
    sizes = read_sizes(reader, eps="layer_norm_eps", activation="gelu_tanh", default_eps=1e-5)
    layer = LayerSpec(rope=None, window=None, scale=sizes["head_dim"] ** -0.5)
    return ModelConfig(
        architecture=architecture,
        layers=(layer,) * num_layers(reader),
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        has_learned_positions=True,
        **_biases(reader),
        **sizes,
    )


def read_jais2(reader: Reader, architecture: str) -> ModelConfig:
    """Read Jais 2's configuration: rotary positions, an ungated squared-ReLU MLP, and biases."""
    sizes = read_sizes(reader, eps="layer_norm_eps", activation="relu_squared", default_eps=1e-5)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        **_biases(reader),
        **sizes,
    )


def read_dbrx(reader: Reader, architecture: str) -> ModelConfig:
    """Read DBRX's configuration: experts in all layers, and clamped queries, keys and values."""
    sizes = read_sizes(reader, eps="layer_norm_eps", default_eps=1e-5)
    experts = read_experts(
        reader, count="num_experts", top_k="num_experts_per_tok", size="intermediate_size",
        is_renormalised=True,
    )  # fmt: skip
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, read_layers(reader, sizes), experts, everywhere),
        has_layer_norm=True,
        clip=reader.number("clip_qkv", 0.0) or None,
        **sizes,
    )


def _biases(reader: Reader) -> dict[str, Any]:
    """Read which products have biases: all in published files."""
    return read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias")


FAMILIES = (
    Family(
        "GPTBigCodeForCausalLM", "starcoder", read_starcoder, Decoder, is_gguf_only=True,
        gguf_names={"model.embed_positions": "position_embd"},
    ),
    Family("Jais2ForCausalLM", "jais2", read_jais2, Decoder, is_gguf_only=True),
    Family(
        "DbrxForCausalLM", "dbrx", read_dbrx, Decoder, is_gguf_only=True,
        gguf_names={"post_attention_layernorm": "attn_output_norm"},
    ),
)  # fmt: skip
