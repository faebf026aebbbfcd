"""Zhipu's ChatGLM 2 and 3, and GLM-4: half of each head rotates, adjacent dims together.

Gate and up are one tensor. The models of 2025 (Glm4) have norms before and after each part.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import SANDWICH_NAMES, Family
from tgi_asgi.models.fused import FusedGateUpWeights, FusedWeights
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


_SHARED_VOCAB_SIZE = 65024  # of ChatGLM 2 and 3


def read_chatglm(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of files for Zhipu's own code; `rope_ratio` multiplies the rotary base."""
    check_computed(
        not reader.get("position_encoding_2d"),
        "ChatGLM 1 has positions in two dimensions, which are not supported; ChatGLM 2 and 3 are",
    )
    reader.drop("vocab_size", "num_key_value_heads")  # their code reads neither
    reader.rename(
        vocab_size=("padded_vocab_size",),
        num_hidden_layers=("num_layers",),
        intermediate_size=("ffn_hidden_size",),
        head_dim=("kv_channels",),
        max_position_embeddings=("seq_length",),
        rms_norm_eps=("layernorm_epsilon",),
        attention_bias=("add_qkv_bias",),
    )
    heads = "multi_query_group_num" if reader.flag("multi_query_attention", False) else "num_attention_heads"
    reader.ignore("multi_query_group_num", "apply_query_key_layer_scaling")
    reader.require(
        rmsnorm=True, post_layer_norm=True, original_rope=True, add_bias_linear=False, interleaved_qkv=False,
        quantization_bit=0, apply_residual_connection_post_layernorm=False, pre_seq_len=None,
    )  # fmt: skip
    ratio = reader.number("rope_ratio", 1.0)
    check_computed(
        ratio == 1 or reader.integer("vocab_size") != _SHARED_VOCAB_SIZE,
        f"rope_ratio {ratio:g}: ChatGLM 2 divides positions by it, ChatGLM 3 multiplies the rotary base, and "
        "config.json does not say which of them this is",
    )
    reader.defaults(
        num_key_value_heads=reader.integer(heads), partial_rotary_factor=0.5, rope_theta=10000.0 * ratio
    )
    return read_glm(reader, architecture)


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


class ChatGlm(Decoder):
    """The decoder with the names of Zhipu's own code."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "transformer.embedding.word_embeddings",
            "model.layers": "transformer.encoder.layers",
            "model.norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
            "self_attn.qkv_proj": "self_attention.query_key_value",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.gate_up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        }
    )


_NAMES = {"mlp.gate_up_proj": "ffn_up"}

FAMILIES = (
    Family("GlmForCausalLM", "chatglm", read_glm, Glm, gguf_names=_NAMES),
    # Its GGUF files are those of the first.
    Family(
        "ChatGLMForConditionalGeneration", None, read_chatglm, ChatGlm,
        unused=("transformer.rotary_pos_emb.inv_freq",),
    ),
    Family("Glm4ForCausalLM", "glm4", read_glm, Glm4, gguf_names={**_NAMES, **SANDWICH_NAMES}),
)  # fmt: skip
