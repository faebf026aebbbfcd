"""Mamba 1 and 2, Falcon Mamba and Codestral Mamba: every layer is a state space, without attention or MLP.

Falcon Mamba also normalises the inputs of steps, B and C.

Sources: Gu and Dao, Mamba, arXiv 2312.00752; Zuo et al., Falcon Mamba, arXiv 2410.05355; Dao and Gu,
Transformers are SSMs, arXiv 2405.21060.
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
from tgi_asgi.models.reading_mamba import read_channels, read_heads_of_states
from tgi_asgi.models.recurrent_specs import ChannelsSpec, MambaSpec

LONGEST = 1 << 17  # the context of models whose files name none


def read_mamba1(reader: Reader, architecture: str) -> ModelConfig:
    """Read Mamba 1's configuration."""
    return _read_channels(reader, architecture, None)


def read_falcon_mamba(reader: Reader, architecture: str) -> ModelConfig:
    """Read Falcon Mamba's configuration."""
    return _read_channels(reader, architecture, reader.number("mixer_rms_eps", 1e-6))


def read_mamba2(reader: Reader, architecture: str) -> ModelConfig:
    """Read Mamba 2's configuration."""
    reader.defaults(
        num_heads=128, head_dim=64, vocab_size=32768, hidden_size=4096, state_size=128, num_hidden_layers=64,
    )  # fmt: skip
    reader.ignore("rms_norm", "norm_before_gate")  # `transformers` reads neither
    mamba = read_heads_of_states(reader, heads="num_heads", head_dim="head_dim", state="state_size")
    return _config(reader, architecture, mamba)


def _read_channels(reader: Reader, architecture: str, norm_eps: float | None) -> ModelConfig:
    reader.defaults(vocab_size=50280, hidden_size=768, num_hidden_layers=32, tie_word_embeddings=True)
    reader.ignore("time_step_scale")  # of the first values in training
    hidden_size, expansion = reader.integer("hidden_size"), reader.integer("expand", 2)
    channels = read_channels(
        reader, hidden_size, width=reader.integer("intermediate_size", expansion * hidden_size),
        state="state_size", taps="conv_kernel", rank="time_step_rank", conv_bias="use_conv_bias",
        bias="use_bias", norm_eps=norm_eps,
    )  # fmt: skip
    return _config(reader, architecture, channels)


def _config(reader: Reader, architecture: str, mixer: ChannelsSpec | MambaSpec) -> ModelConfig:
    """Return the configuration; it has no sizes of attention and of MLPs."""
    reader.require(hidden_act="silu")
    # A type, and a scale of the first values in training.
    reader.ignore("residual_in_fp32", "rescale_prenorm_residual")
    reader.replace("max_position_embeddings", reader.get("max_position_embeddings") or LONGEST)
    layer = LayerSpec(None, None, 1.0, recurrent=mixer, part="mixer")
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
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
                for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "norm", "out_proj")
            },
        }
    )


_GGUF_NAMES = {"mamba.x_proj": "ssm_x", "mamba.dt_proj": "ssm_dt"}
FAMILIES = (
    Family("MambaForCausalLM", "mamba", read_mamba1, Mamba, gguf_names=_GGUF_NAMES),
    Family("FalconMambaForCausalLM", "mamba", read_falcon_mamba, Mamba, gguf_names=_GGUF_NAMES),
    Family("Mamba2ForCausalLM", "mamba2", read_mamba2, Mamba),
)
