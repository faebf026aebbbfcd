"""IBM's Granite 4 where it is dense: Granite 3 with an MLP that others share between experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig, check
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.families.granite import read_granite
from tgi_asgi.models.family import Family
from tgi_asgi.models.layers import LayerWeights, Sources
from tgi_asgi.models.reader import Reader


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
        rows = [self.config.intermediate_size] * 2
        return self.cut("shared_mlp.input_linear.weight", rows, self.config.hidden_size)

    def linear(self, name: str, rows: int, columns: int, *, has_bias: bool) -> ops.LinearWeight:
        """Make the weight of a single product."""
        name = "shared_mlp.output_linear" if name == "mlp.down_proj" else name
        return super().linear(name, rows, columns, has_bias=has_bias)


class Granite4(Decoder):
    """The decoder with such weights."""

    weights_class = Granite4Weights


FAMILIES = (Family("GraniteMoeHybridForCausalLM", None, read_granite4, Granite4, computes=_is_dense),)
