"""OpenAI's GPT-2: learned position embeddings, LayerNorm, MLPs without a gate.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, section 2.3.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import LLAMA_NAMES, num_layers, read_sizes


def read_gpt2(reader: Reader, architecture: str) -> ModelConfig:
    """Read GPT-2's configuration; some variants also divide scores by the layer's number."""
    reader.drop(*LLAMA_NAMES)
    reader.rename(
        hidden_size=("n_embd",),
        num_hidden_layers=("n_layer",),
        num_attention_heads=("n_head",),
        intermediate_size=("n_inner",),
        max_position_embeddings=("n_positions", "n_ctx"),
        hidden_act=("activation_function",),
        layer_norm_eps=("layer_norm_epsilon",),
    )
    reader.defaults(intermediate_size=4 * reader.integer("hidden_size"), tie_word_embeddings=True)
    # GPTQModel writes `rope_parameters` to every configuration.
    reader.ignore("reorder_and_upcast_attn", "summary_activation", "rope_parameters")
    reader.require(add_cross_attention=False)
    sizes = read_sizes(reader, activation="gelu_tanh", eps="layer_norm_eps", default_eps=1e-5)
    scale = sizes["head_dim"] ** -0.5 if reader.flag("scale_attn_weights", True) else 1.0
    by_layer = reader.flag("scale_attn_by_inverse_layer_idx", False)
    layers = (
        LayerSpec(rope=None, window=None, scale=scale / (index + 1) if by_layer else scale)
        for index in range(num_layers(reader))
    )
    return ModelConfig(
        architecture=architecture,
        layers=tuple(layers),
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        has_learned_positions=True,
        **sizes,
    )


class Gpt2(Decoder):
    """The decoder with the names and the transposed matrices of GPT-2."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.qkv_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        is_transposed=True,
    )


FAMILIES = (
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        read_gpt2,
        Gpt2,
        gguf_names={"model.embed_positions": "position_embd"},
        unused=("*.attn.bias", "*.attn.masked_bias"),
    ),
)
