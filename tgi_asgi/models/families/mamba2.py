"""Mamba 2, and Mistral's Codestral Mamba: every layer is a state space, without attention or MLP.

Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060.
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
from tgi_asgi.models.reading_mamba import read_heads_of_states

LONGEST = 1 << 17  # the context of models whose files name none


def read_mamba2(reader: Reader, architecture: str) -> ModelConfig:
    """Read Mamba 2's configuration; it has no sizes of attention and of MLPs."""
    reader.defaults(
        num_heads=128, head_dim=64, vocab_size=32768, hidden_size=4096, state_size=128, num_hidden_layers=64,
    )  # fmt: skip
    reader.require(hidden_act="silu")
    reader.ignore("residual_in_fp32", "rescale_prenorm_residual")
    mamba = read_heads_of_states(reader, heads="num_heads", head_dim="head_dim", state="state_size")
    layer = LayerSpec(None, None, 1.0, recurrent=mamba, part="mixer")
    reader.replace("max_position_embeddings", reader.get("max_position_embeddings") or LONGEST)
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


class Mamba2(Decoder):
    """The decoder with Mamba's names; each layer is one part."""

    layer_class = SinglePartLayer
    checkpoint = CheckpointLayout(
        names={
            "model.layers": "backbone.layers",
            "model.embed_tokens": "backbone.embeddings",
            "model.norm": "backbone.norm_f",
            "input_layernorm": "norm",
            "mamba": "mixer",
            **{f"mamba.{name}": f"mixer.{name}" for name in ("in_proj", "conv1d", "norm", "out_proj")},
        }
    )


FAMILIES = (Family("Mamba2ForCausalLM", "mamba2", read_mamba2, Mamba2),)
