"""Microsoft's Phi 1, 1.5 and 2: parallel attention and MLP after one LayerNorm, biases everywhere.

Source: Li et al., Textbooks Are All You Need II, arXiv 2309.05463, section 2.1.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_layers, read_sizes


def read_phi(reader: Reader, architecture: str) -> ModelConfig:
    """Read Phi's configuration; half of each head rotates unless the file says otherwise."""
    reader.defaults(partial_rotary_factor=0.5)
    sizes = read_sizes(reader, activation="gelu_tanh", eps="layer_norm_eps", default_eps=1e-5)
    has_qk_norm = reader.flag("qk_layernorm", False)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, has_partial_rotary=True),
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
        has_gate=False,
        has_qk_norm=has_qk_norm,
        has_layer_norm=True,
        has_norm_bias=True,
        has_head_bias=True,
        is_parallel=True,
        has_mlp_norm=False,
        **sizes,
    )


class Phi(Decoder):
    """The decoder with the names of Phi."""

    checkpoint = CheckpointLayout(
        names={
            "model.norm": "model.final_layernorm",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        }
    )


FAMILIES = (Family("PhiForCausalLM", "phi2", read_phi, Phi),)
