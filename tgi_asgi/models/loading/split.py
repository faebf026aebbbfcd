"""How the weights of a native model are divided among shards, decided before any of them is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.experts import down_names, shared_down_names
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.shard import NO_COLUMNS, Columns, ModelCut, cut_model


class Blocks(Protocol):
    """Weights whose matrices consist of blocks."""

    def block_columns(self, name: str) -> int:
        """Return how many columns of a matrix must stay together when it is cut; 1 if it does not exist."""


def unsplit(config: ModelConfig, family: Family, *, reads_images: bool = False) -> str | None:
    """Return a feature of the model that several shards do not compute; None if there is none.

    Args:
        reads_images: Whether the shards can have images' rows from the first one.
    """
    found = {
        "an encoder of images": config.images is not None and not reads_images,
        "recurrent layers": config.has_states,
        "gates of heads": config.has_output_gate or config.has_head_gates,
        "layers of one part": any(layer.part is not None for layer in config.layers),
        "layers of several shapes": any(layer.sizes is not None for layer in config.layers),
        "experts of several shapes": len({layer.experts for layer in config.layers} - {None}) > 1,
        "norms over all heads": _reader(family).has_whole_norms,
        "no head that gives text": not config.generates,
    }
    return next((name for name, holds in found.items() if holds), None)


def split(config: ModelConfig, family: Family, weights: Blocks, count: int) -> list[ModelCut]:
    """Return each of `count` shards' part of a model without what `unsplit` names.

    Raises:
        ModelLoadError: if it has too few parts.
    """
    experts = next((layer.experts for layer in config.layers if layer.experts is not None), None)
    latent = next((layer.latent for layer in config.layers if layer.latent is not None), None)

    def columns(number: int, *names: str) -> Columns:
        """Return this many columns, with the blocks of all layers' matrices of these names."""
        return Columns(number, _block(weights, names, config.num_layers)) if number else NO_COLUMNS

    of_expert = of_shared = NO_COLUMNS
    downs: list[str] = []
    shared_downs: list[str] = []
    if experts is not None:
        for names in _reader(family).expert_names:
            downs += down_names(names, experts.num_experts)
            shared_downs += shared_down_names(names)
        of_expert = columns(experts.intermediate_size, *downs)
        of_shared = columns(experts.shared_size, *shared_downs)
    # A layer with both, as Gemma 4's, is one of several shapes.
    has_mlp = any(layer.experts is None for layer in config.layers)
    return cut_model(
        count,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim if latent is None else latent.value_dim,
        vocab_size=config.vocab_size,
        inner=columns(config.intermediate_size if has_mlp else 0, "mlp.down_proj.weight"),
        of_expert=of_expert,
        of_shared=of_shared,
        output_block=_block(weights, ["self_attn.o_proj.weight"], config.num_layers),
    )


def _reader(family: Family) -> type[LayerWeights]:
    """Return the class that reads the family's layers."""
    found: type[LayerWeights] = getattr(family.model, "weights_class", LayerWeights)
    return found


def _block(weights: Blocks, names: Iterable[str], num_layers: int) -> int:
    """Return how many columns must stay together in all layers' matrices of these names."""
    found = {f"model.layers.{index}.{name}" for name in names for index in range(num_layers)}
    return math.lcm(*map(weights.block_columns, found))
