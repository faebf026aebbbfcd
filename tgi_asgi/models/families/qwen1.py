"""Alibaba's Qwen 1: Llama with GPT-2's names, one tensor of q, k and v, and biases of these.

Source: Bai et al., Qwen, arXiv 2309.16609, section 2.3.
"""

from __future__ import annotations

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes, rms_eps_key


def read_qwen1(reader: Reader, architecture: str) -> ModelConfig:
    """Read Qwen 1's configuration, which counts the gate and the up product as one.

    The context is that of the training. Beyond it, the model's own code changes the base of the rotary
    embedding and multiplies queries by logarithms of their positions (`use_dynamic_ntk`, `use_logn_attn`).
    """
    reader.rename(
        head_dim=("kv_channels",),
        rms_norm_eps=("layer_norm_epsilon",),
        rope_theta=("rotary_emb_base",),
    )
    reader.require(
        rotary_pct=1.0, no_bias=True, scale_attn_weights=True, use_cache_quantization=False, visual=None,
        audio=None,
    )  # fmt: skip
    reader.ignore("use_dynamic_ntk", "use_logn_attn")
    if not reader.is_gguf and reader.get("seq_length") is not None:
        reader.replace("max_position_embeddings", reader.integer("seq_length"))
    reader.defaults(attention_bias=True)
    sizes = read_sizes(reader, eps=rms_eps_key(reader))
    size = sizes["intermediate_size"]
    name = "feed_forward_length" if reader.is_gguf else "intermediate_size"
    check(size % 2 == 0, f"{name} must be even, got {size}")
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        **read_biases(reader, qkv="attention_bias"),
        **{**sizes, "intermediate_size": size // 2},
    )


class Qwen1(Decoder):
    """The decoder with Qwen 1's names."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "transformer.wte",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.qkv_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.gate_proj": "mlp.w2",
            "mlp.up_proj": "mlp.w1",
            "mlp.down_proj": "mlp.c_proj",
        }
    )


FAMILIES = (Family("QWenLMHeadModel", "qwen", read_qwen1, Qwen1),)
