"""IBM's Bamba: Mamba-2 in most layers, attention in the others, and an MLP in each.

Source: `transformers.models.bamba`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout, mlp_names
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_mamba import read_mamba


def read_bamba(reader: Reader, architecture: str) -> ModelConfig:
    """Read Bamba's configuration."""
    reader.defaults(
        vocab_size=128000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=262144,
    )  # fmt: skip
    reader.drop("partial_rotary_factor")
    sizes = read_sizes(reader, default_eps=1e-5)
    check_computed(sizes["activation"] == "silu", f"hidden_act must be silu, got {sizes['activation']}")
    mamba = read_mamba(reader, sizes["hidden_size"])
    layers = read_layers(reader, sizes, has_partial_rotary=True, edit_rope=_turn_half)
    attends = _read_attending(reader)
    return ModelConfig(
        architecture=architecture,
        layers=tuple(
            layer if index in attends else replace(layer, rope=None, recurrent=mamba)
            for index, layer in enumerate(layers)
        ),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


def _turn_half(rope: dict[str, Any]) -> None:
    """Rotate half of each head, unless `rope_parameters` say otherwise; `transformers` reads no other key."""
    if rope.get("partial_rotary_factor") is None:
        rope["partial_rotary_factor"] = 0.5


def _read_attending(reader: Reader) -> set[int]:
    """Return the indices of layers with attention."""
    given, count = reader.get("attn_layer_indices") or [], num_layers(reader)
    check(
        isinstance(given, list) and all(type(each) is int and 0 <= each < count for each in given),
        f"attn_layer_indices must be indices of {count} layers, got {str(given)[:100]}",
    )
    return set(given)


class Bamba(Decoder):
    """The decoder with Bamba's names."""

    checkpoint = CheckpointLayout(
        names={
            "model.norm": "model.final_layernorm",
            "post_attention_layernorm": "pre_ff_layernorm",
            **mlp_names("feed_forward"),
        }
    )


FAMILIES = (Family("BambaForCausalLM", None, read_bamba, Bamba),)
