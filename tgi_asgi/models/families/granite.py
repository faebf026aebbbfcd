"""IBM's Granite 3, and 4 where it is dense: Llama with constant factors.

They are on the embedding, on scores, on what parts add to the residual, and on logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig, check
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layers import LayerWeights, Sources
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes


def read_granite(reader: Reader, architecture: str) -> ModelConfig:
    """Read Granite's; its logits are divided by what the file calls their scaling."""
    sizes = read_sizes(reader)
    qkv_bias, output_bias = read_biases(reader, "attention_bias", "attn_q", "attn_output")
    (mlp_bias,) = read_biases(reader, "mlp_bias", "ffn_gate")
    default_scale = sizes["head_dim"] ** -0.5 if reader.is_gguf else 1.0  # as each of the two converts it
    scale = reader.number("attention_multiplier", default_scale)
    # So llama.cpp's files say whether positions matter to this architecture.
    has_rope = not reader.is_gguf or reader.flag("rope.scaling.finetuned", True)
    layers = read_layers(reader, sizes, scale=scale, has_rope=[has_rope] * num_layers(reader))
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        has_qkv_bias=qkv_bias,
        has_output_bias=output_bias,
        has_mlp_bias=mlp_bias,
        embedding_factor=reader.number("embedding_multiplier", 1.0),
        residual_factor=reader.number("residual_multiplier", 1.0),
        logits_scale=1.0 / (reader.number("logits_scaling", 1.0) or 1.0),
        **sizes,
    )


def _is_dense(config: Mapping[str, Any]) -> bool:
    kinds = config.get("layer_types") or config.get("layers_block_type")
    has_states = not isinstance(kinds, list) or not set(map(str, kinds)) <= {"attention", "full_attention"}
    return config.get("num_local_experts") == 0 and not has_states


def read_granite4(reader: Reader, architecture: str) -> ModelConfig:
    """Read Granite 4's without experts and states: what has such runs by the code of transformers."""
    names = ("num_local_experts", "layer_types", "layers_block_type")
    check(
        _is_dense({name: reader.get(name) for name in names}),
        "only models without experts and states are computed: num_local_experts 0, all layers attention",
    )
    inner = reader.integer("shared_intermediate_size", 1024)
    reader.ignore("mamba_conv_bias", "mamba_proj_bias", "normalization_function")
    position = reader.get("position_embedding_type")
    check(position in (None, "rope", "nope"), f"position_embedding_type {position!r} is not supported")
    config = read_granite(reader, architecture)
    layers = config.layers
    if position != "rope":
        layers = tuple(replace(layer, rope=None) for layer in layers)
    return replace(config, layers=layers, intermediate_size=inner)


class Granite4Weights(LayerWeights):
    """A layer whose MLP is what others share between experts: gate and up are one tensor."""

    def gate_up_sources(self) -> Sources:
        """Cut the tensor of gate and up by rows."""
        return self.cut("shared_mlp.input_linear", [self.config.intermediate_size] * 2)

    def linear(self, name: str, rows: int, columns: int, *, has_bias: bool) -> ops.LinearWeight:
        """Make the weight of a single product."""
        name = "shared_mlp.output_linear" if name == "mlp.down_proj" else name
        return super().linear(name, rows, columns, has_bias=has_bias)


class Granite4(Decoder):
    """The decoder with such weights."""

    weights_class = Granite4Weights


FAMILIES = (
    Family("GraniteForCausalLM", "granite", read_granite, Decoder, is_rotary_permuted=True),
    Family("GraniteMoeHybridForCausalLM", None, read_granite4, Granite4, computes=_is_dense),
)
