"""Weights of a checkpoint by canonical names, translated to the family's names, with or without prefix."""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tgi_asgi.models.checkpoint import CheckpointLayout, is_of_layer
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading.kv_scales import read_kv_scales
from tgi_asgi.models.loading.recognise import produces_vectors
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.models.loading.weights import WHOLE
from tgi_asgi.models.shard import CUT_COLUMNS
from tgi_asgi.ops import WeightSource

logger = logging.getLogger(__name__)

_EMBEDDING = "model.embed_tokens.weight"


class CheckpointWeights:
    """`Weights` of files whose names, rows and columns a `CheckpointLayout` describes.

    Attributes:
        is_bare: Whether the model was saved without its head, as embedding models are, and BLOOM and GPT-2 on
            the Hub. Names then lack their prefix: `layers.0...` instead of `model.layers.0...`.
    """

    def __init__(self, weights: SafetensorsWeights, layout: CheckpointLayout, config: ModelConfig) -> None:
        self._weights, self._layout, self._config = weights, layout, config
        self.num_bytes, self.is_gguf = weights.num_bytes, weights.is_gguf
        embedding = layout.tensor(_EMBEDDING)
        self.is_bare = embedding not in weights and embedding.removeprefix(layout.prefix) in weights
        prefixes = [f"{layout.prefix}{layout.part}."] if layout.part is not None else []
        self._prefix = next(
            (
                each
                for each in (*prefixes, *layout.other_prefixes)
                if embedding.replace(layout.prefix, each, 1) in weights
            ),
            layout.prefix,
        )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.stored_name(name) in self._weights

    def stored_name(self, name: str) -> str:
        """Return the files' name of a tensor: the layout's, or as `transformers` 5 names GPT-NeoX's head."""
        stored = self._layout.tensor(name)
        if stored not in self._weights and name in self._weights and not is_of_layer(name):
            return name
        rest = stored.removeprefix(self._layout.prefix)
        return rest if self.is_bare or rest == stored else self._prefix + rest

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        stored = self.stored_name(name)
        order = self._layout.row_order(self._config, name.rpartition(".")[0])
        # Tools that quantise turn the matrices of a `Conv1D` first, so that they are as in a `Linear`.
        is_plain = not self._weights.is_quantised(stored)
        is_transposed = self._layout.is_transposed and len(shape) == 2 and is_of_layer(name) and is_plain
        if order is None and not is_transposed:
            return self._weights.get(stored, shape, part)
        source = self._weights.get(stored, shape[::-1] if is_transposed else shape)
        if is_transposed:
            source = source.transposed()
        if order is not None:
            source = source.in_rows(order)
        start, stop, _ = part.indices(shape[0])
        return source.rows(start, stop)

    @property
    def has_own_head(self) -> bool:
        """Whether the files hold a head, and its values are not the embedding's."""
        names = [self.stored_name(name) for name in ("lm_head.weight", _EMBEDDING)]
        return all(name in self._weights for name in names) and not self._weights.are_equal(*names)

    def kv_scales(self) -> list[tuple[float, float]]:
        """Return each layer's scales of keys and of values, as described in `read_kv_scales`."""

        def read(name: str) -> tuple[str, npt.NDArray[np.float32]] | None:
            stored = self.stored_name(name)
            values = self._weights.floats(stored)
            return None if values is None else (stored, values)

        return read_kv_scales(read, self._config.num_layers)

    def unread(self) -> list[str]:
        """Return the names that were not read, as described in `Weights.unread`."""
        return self._weights.unread()

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`."""
        layers = range(self._config.num_layers)
        cut = {
            self.stored_name(f"model.layers.{layer}.{name}.weight")
            for layer in layers
            for name in CUT_COLUMNS
        }
        return self._weights.stored(cut)

    def block_columns(self, name: str) -> int:
        """Return how many columns of a matrix must stay together when it is cut; 1 if it does not exist."""
        return self._weights.block_columns(self.stored_name(name))

    def close(self) -> None:
        """Unmap the files."""
        self._weights.close()


def with_its_head(config: ModelConfig, weights: CheckpointWeights, names: Container[str]) -> ModelConfig:
    """Return the configuration of a checkpoint with the head that its files have, whatever it says.

    Args:
        names: The files' names.
    """
    is_bare = weights.is_bare or produces_vectors(config.architecture)
    if is_bare and not config.has_tied_embeddings and "lm_head.weight" not in names:
        config = replace(config, has_head=False)
    if config.generates and config.has_tied_embeddings and weights.has_own_head:
        logger.warning(
            "config.json says that the head is the embedding, but the files hold another head; that is used, "
            "as in transformers 5"
        )
        config = replace(config, has_tied_embeddings=False)
    return config
