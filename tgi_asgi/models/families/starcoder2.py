"""BigCode's StarCoder 2: rotary positions and few KV heads, with LayerNorm, biases and ungated MLPs.

Source: Lozhkov et al., StarCoder 2 and The Stack v2, arXiv 2402.19173, section 6.1.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes, read_window


def read_starcoder2(reader: Reader, architecture: str) -> ModelConfig:
    """Read StarCoder 2's configuration."""
    reader.drop("layer_norm_eps")
    reader.rename(layer_norm_eps=("norm_epsilon",))
    reader.defaults(tie_word_embeddings=True, num_key_value_heads=2, use_bias=True)
    # Files repeat some settings under the names of BigCode's other code.
    reader.ignore("activation_function", "layer_norm_epsilon", "scale_attention_softmax_in_fp32")
    reader.require(mlp_type="default", norm_type="layer_norm", scale_attn_weights=True)
    sizes = read_sizes(reader, activation="gelu_tanh", eps="layer_norm_eps", default_eps=1e-5)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, windows=read_window(reader)),
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        **read_biases(reader, qkv="use_bias", output="use_bias", mlp="use_bias"),
        **sizes,
    )


class Starcoder2(Decoder):
    """The decoder with the names of StarCoder's MLP."""

    checkpoint = CheckpointLayout(names={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})


FAMILIES = (Family("Starcoder2ForCausalLM", "starcoder2", read_starcoder2, Starcoder2),)
