"""Mamba 1 and TII's Falcon Mamba: every layer is a state space, without attention or MLP.

Falcon Mamba also normalises the inputs of steps, B and C.

Sources: Gu and Dao, Mamba, arXiv 2312.00752; Zuo et al., Falcon Mamba, arXiv 2410.05355.
"""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_LAYERS
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.layers import SinglePartLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_mamba import read_channels

LONGEST = 1 << 17  # the context of models whose files name none


def read_mamba1(reader: Reader, architecture: str) -> ModelConfig:
    """Read Mamba's configuration; it has no sizes of attention and of MLPs."""
    return _read(reader, architecture, None)


def read_falcon_mamba(reader: Reader, architecture: str) -> ModelConfig:
    """Read Falcon Mamba's configuration."""
    return _read(reader, architecture, reader.number("mixer_rms_eps", 1e-6))


def _read(reader: Reader, architecture: str, norm_eps: float | None) -> ModelConfig:
    reader.defaults(vocab_size=50280, hidden_size=768, num_hidden_layers=32, tie_word_embeddings=True)
    reader.require(hidden_act="silu")
    # A type, and scales of the first values in training.
    reader.ignore("residual_in_fp32", "rescale_prenorm_residual", "time_step_scale")
    hidden_size, expansion = reader.integer("hidden_size"), reader.integer("expand", 2)
    channels = read_channels(
        reader, hidden_size, width=reader.integer("intermediate_size", expansion * hidden_size),
        state="state_size", taps="conv_kernel", rank="time_step_rank", conv_bias="use_conv_bias",
        bias="use_bias", norm_eps=norm_eps,
    )  # fmt: skip
    layer = LayerSpec(None, None, 1.0, recurrent=channels, part="mixer")
    reader.replace("max_position_embeddings", reader.get("max_position_embeddings") or LONGEST)
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        context_length=reader.positive("max_position_embeddings", MAX_CONTEXT),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        layers=(layer,) * reader.positive("num_hidden_layers", MAX_LAYERS),
        has_tied_embeddings=reader.flag("tie_word_embeddings", False),
    )


class Mamba(Decoder):
    """The decoder with Mamba's names; each layer is one part."""

    layer_class = SinglePartLayer
    checkpoint = CheckpointLayout(
        names={
            "model.layers": "backbone.layers",
            "model.embed_tokens": "backbone.embeddings",
            "model.norm": "backbone.norm_f",
            "input_layernorm": "norm",
            "mamba": "mixer",
            **{
                f"mamba.{name}": f"mixer.{name}"
                for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
            },
        }
    )


_GGUF_NAMES = {"mamba.x_proj": "ssm_x", "mamba.dt_proj": "ssm_dt"}
FAMILIES = (
    Family("MambaForCausalLM", "mamba", read_mamba1, Mamba, gguf_names=_GGUF_NAMES),
    Family("FalconMambaForCausalLM", "mamba", read_falcon_mamba, Mamba, gguf_names=_GGUF_NAMES),
)
