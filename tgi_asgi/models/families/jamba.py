"""AI21's Jamba: Mamba 1 in most layers, attention without positions in some, and experts in some.

Source: Lieber et al., Jamba, arXiv 2403.19887; `transformers.models.jamba`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout, mlp_names
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_sizes
from tgi_asgi.models.reading_experts import read_experts
from tgi_asgi.models.reading_mamba import read_channels


def read_jamba(reader: Reader, architecture: str) -> ModelConfig:
    """Read Jamba's configuration."""
    reader.rename(num_experts=("num_local_experts",))
    reader.defaults(
        vocab_size=65536, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=262144, num_experts=16,
        num_experts_per_tok=2,
    )  # fmt: skip
    reader.ignore("mamba_inner_layernorms")  # the code always has them
    sizes = read_sizes(reader)
    check_computed(sizes["activation"] == "silu", f"hidden_act must be silu, got {sizes['activation']}")
    channels = read_channels(
        reader, sizes["hidden_size"], width=reader.integer("mamba_expand", 2) * sizes["hidden_size"],
        state="mamba_d_state", taps="mamba_d_conv", rank="mamba_dt_rank", conv_bias="mamba_conv_bias",
        bias="mamba_proj_bias", norm_eps=sizes["norm_eps"], has_norm_weights=True,
    )  # fmt: skip
    experts = read_experts(reader, count="num_experts", top_k="num_experts_per_tok", size="intermediate_size")
    attends, routes = _where(reader, "attn_layer", 8, 4), _where(reader, "expert_layer", 2, 1)
    attention = LayerSpec(None, None, sizes["head_dim"] ** -0.5)
    return ModelConfig(
        architecture=architecture,
        layers=tuple(
            replace(
                attention,
                recurrent=None if attends(index) else channels,
                experts=experts if experts.num_experts > 1 and routes(index) else None,
            )
            for index in range(num_layers(reader))
        ),
        **sizes,
    )


def _where(reader: Reader, what: str, period: int, offset: int) -> Callable[[int], bool]:
    """Return a predicate for the layers of a kind, given the defaults of their period and offset."""
    period = reader.integer(f"{what}_period", period)
    offset = reader.integer(f"{what}_offset", offset)
    check(0 <= offset < period, f"{what}_offset must be in 0..{period - 1}, got {offset}")
    return lambda index: index % period == offset


class _Weights(LayerWeights):
    """The weights of a layer, whose experts have names of their own in checkpoints."""

    expert_names = (
        ExpertNames(
            router="feed_forward.router", experts="feed_forward.experts",
            joined="feed_forward.experts.gate_up_proj", joined_down="feed_forward.experts.down_proj",
        ),
        ExpertNames(),
    )  # fmt: skip


class Jamba(Decoder):
    """The decoder with Jamba's names."""

    weights_class = _Weights
    checkpoint = CheckpointLayout(
        names={
            "model.norm": "model.final_layernorm",
            "post_attention_layernorm": "pre_ff_layernorm",
            **mlp_names("feed_forward"),
        }
    )


_GGUF_NAMES = {
    "mamba.x_proj": "ssm_x",
    "mamba.dt_proj": "ssm_dt",
    "mamba.dt_layernorm": "ssm_dt_norm",
    "mamba.b_layernorm": "ssm_b_norm",
    "mamba.c_layernorm": "ssm_c_norm",
}
FAMILIES = (Family("JambaForCausalLM", "jamba", read_jamba, Jamba, gguf_names=_GGUF_NAMES),)
