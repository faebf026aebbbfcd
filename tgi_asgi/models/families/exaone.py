"""LG's EXAONE 3 and 3.5: Llama with GPT-2's names.

Source: LG AI Research, EXAONE 3.0, arXiv 2408.03541, section 2.1.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes, rms_eps_key


def read_exaone(reader: Reader, architecture: str) -> ModelConfig:
    """Read EXAONE's configuration."""
    reader.rename(
        num_hidden_layers=("num_layers",),
        hidden_act=("activation_function",),
        rms_norm_eps=("layer_norm_epsilon",),
    )
    sizes = read_sizes(reader, eps=rms_eps_key(reader), default_eps=1e-5)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


class Exaone(Decoder):
    """The decoder with EXAONE's names."""

    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "transformer.wte",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.q_proj": "attn.attention.q_proj",
            "self_attn.k_proj": "attn.attention.k_proj",
            "self_attn.v_proj": "attn.attention.v_proj",
            "self_attn.o_proj": "attn.attention.out_proj",
            "mlp.gate_proj": "mlp.c_fc_0",
            "mlp.up_proj": "mlp.c_fc_1",
            "mlp.down_proj": "mlp.c_proj",
        }
    )


FAMILIES = (Family("ExaoneForCausalLM", "exaone", read_exaone, Exaone),)
