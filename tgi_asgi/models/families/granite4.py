"""IBM's Granite 4: Granite 3 with Mamba-2 in most layers, and an MLP shared by all tokens besides experts.

Models that are dense, or have no recurrent layers, use this architecture, too.
"""

from __future__ import annotations

from dataclasses import replace

from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.families.granite import read_granite
from tgi_asgi.models.families.granite_moe import GraniteMoeWeights
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedGateUpWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import check_layer_types, num_layers, read_kv_heads
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts
from tgi_asgi.models.reading_mamba import read_mamba

_RECURRENT, _ATTENDING = ("mamba", "linear_attention"), ("attention", "full_attention")


def read_granite4(reader: Reader, architecture: str) -> ModelConfig:
    """Read Granite 4's configuration."""
    is_recurrent = _read_kinds(reader)
    if reader.is_gguf:
        read_kv_heads(reader, [not each for each in is_recurrent])
    reader.ignore("normalization_function", "num_experts_per_tok")
    inner = reader.integer("shared_intermediate_size", 1024)
    position = reader.get("position_embedding_type")
    check_computed(
        position in (None, "rope", "nope"), f"position_embedding_type {position!r} is not supported"
    )
    config = read_granite(reader, architecture)
    check_computed(config.activation == "silu", f"hidden_act must be silu, got {config.activation}")
    reader.ignore("mamba_conv_bias", "mamba_proj_bias")
    mamba = read_mamba(reader, config.hidden_size) if any(is_recurrent) else None
    layers = config.layers
    if position != "rope" and not reader.is_gguf:
        layers = tuple(replace(layer, rope=None) for layer in layers)
    layers = tuple(
        replace(layer, rope=None, recurrent=mamba) if each else layer
        for each, layer in zip(is_recurrent, layers, strict=True)
    )
    reader.defaults(num_local_experts=8, num_experts_per_tok=2)
    if reader.integer("num_local_experts", 0):
        experts = read_experts(
            reader, count="num_local_experts", top_k="num_experts_per_tok", size="intermediate_size",
            is_renormalised=True, shared_size=inner,
        )  # fmt: skip
        layers = with_experts(reader, layers, experts, everywhere)
    return replace(config, layers=layers, intermediate_size=inner)


def _read_kinds(reader: Reader) -> list[bool]:
    """Return which layers are recurrent; in a GGUF file, tensors show it."""
    count = num_layers(reader)
    if reader.is_gguf:
        return [f"blk.{index}.ssm_in.weight" in reader.tensors for index in range(count)]
    kinds = reader.get("layer_types") or reader.get("layers_block_type") or [_RECURRENT[0]] * count
    reader.ignore("layers_block_type")
    found = check_layer_types(kinds, count, (*_RECURRENT, *_ATTENDING))
    return [kind in _RECURRENT for kind in found]


class Granite4Weights(FusedGateUpWeights, GraniteMoeWeights):
    """A layer with gate and up as one tensor; llama.cpp stores them separately."""


class Granite4(Decoder):
    """The decoder with Granite 4's weights; the MLP of dense models has the names of the shared one."""

    weights_class = Granite4Weights
    checkpoint = CheckpointLayout(
        names={
            "mlp.gate_up_proj": "shared_mlp.input_linear",
            "mlp.down_proj": "shared_mlp.output_linear",
        }
    )


FAMILIES = (
    Family(
        "GraniteMoeHybridForCausalLM",
        "granitehybrid",
        read_granite4,
        Granite4,
        is_rotary_permuted=True,
    ),
)
