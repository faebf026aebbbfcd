"""EleutherAI's GPT-NeoX and Pythia: parallel attention and MLP, each after its own LayerNorm.

Source: Black et al., GPT-NeoX-20B, arXiv 2204.06745, section 2.1.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights, rows_by_group
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_gpt_neox(reader: Reader, architecture: str) -> ModelConfig:
    """Read GPT-NeoX's configuration; a quarter of each head rotates unless the file says otherwise."""
    reader.drop("num_key_value_heads", "rope_theta", "partial_rotary_factor")
    reader.rename(partial_rotary_factor=("rotary_pct",), rope_theta=("rotary_emb_base",))
    reader.defaults(partial_rotary_factor=0.25, attention_bias=True)
    sizes = read_sizes(reader, activation="gelu", eps="layer_norm_eps", default_eps=1e-5)
    check_computed(
        sizes["head_dim"] * sizes["num_heads"] == sizes["hidden_size"],
        f"head_dim is {sizes['head_dim']}, which this architecture would use for the rotary embedding only",
    )
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, has_partial_rotary=True),
        has_mlp_bias=True,
        has_gate=False,
        has_layer_norm=True,
        has_norm_bias=True,
        is_parallel=reader.flag("use_parallel_residual", True),
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


class GptNeoX(Decoder):
    """The decoder with q, k and v of each head adjacent."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            "self_attn.qkv_proj": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        row_order=rows_by_group,
    )


FAMILIES = (
    Family(
        "GPTNeoXForCausalLM",
        "gptneox",
        read_gpt_neox,
        GptNeoX,
        unused=("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias"),
    ),
)
