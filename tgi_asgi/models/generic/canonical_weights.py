"""The weights of a module under the names of a native decoder, from which `common.py` rebuilds the module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.weights import Filler
from tgi_asgi.models.loading import WHOLE, NamedWeights
from tgi_asgi.ops.tensors import from_tensor, plain_tensor


class CanonicalWeights:
    """The `Weights` of a module by the names that `Decoder` requests.

    Args:
        chosen: Indices of the module's layers that serve as layers 0, 1, ...
        offset: Number that the module's norms add to their weights.
        rows: Number of first rows of the embedding and the head to provide.

    Attributes:
        prefix: Path of the decoder in the module.
    """

    def __init__(
        self, module: Any, weights: NamedWeights, chosen: Sequence[int], offset: float, rows: int
    ) -> None:
        self._filler = Filler(module, weights)
        self._module, self._chosen, self._offset, self._rows = module, chosen, offset, rows
        decoder = module.get_decoder()
        self.prefix = next(path for path, each in module.named_modules() if each is decoder)
        self._head = next(
            path for path, each in module.named_modules() if each is module.get_output_embeddings()
        )
        self.num_bytes, self.is_gguf = weights.num_bytes, weights.is_gguf

    def __contains__(self, name: object) -> bool:
        return False  # no tensor is optional here

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> ops.WeightSource:
        """Return a tensor; see `Weights.get`."""
        start, stop, _ = part.indices(shape[0])
        return self._whole(name, shape).rows(start, stop)

    def _whole(self, name: str, shape: tuple[int, ...]) -> ops.WeightSource:
        source = self._filler.source(self._own_name(name))
        if name.endswith("norm.weight") and self._offset:
            return from_tensor(plain_tensor(source).float() + self._offset)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            source = source.rows(0, self._rows)
        if source.shape != shape:
            raise ModelLoadError(f"tensor {name!r} has the shape {source.shape}, not {shape}")
        return source

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that the module needs for its chosen layers, as float32, by its own names."""
        layers = {f"{self.prefix}.layers.{index}." for index in self._chosen}
        vocabulary = {f"{self.prefix}.embed_tokens.weight", f"{self._head}.weight"}
        for name in self._filler.names():
            is_of_layer = ".layers." in name
            if is_of_layer and not any(name.startswith(layer) for layer in layers):
                continue
            source = self._filler.source(name)
            if name in vocabulary:
                source = source.rows(0, self._rows)
            yield name, plain_tensor(source.in_order()).float()

    def unread(self) -> list[str]:
        """Return nothing: the filler has already refused unknown tensors."""
        return []

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return nothing: memory has already been counted."""
        return {}

    def close(self) -> None:
        """Do nothing: the caller owns the files."""

    def _own_name(self, name: str) -> str:
        if name.startswith("lm_head."):
            return name.replace("lm_head", self._head, 1)
        rest = name.removeprefix("model.")
        if rest.startswith("layers."):
            _, index, leaf = rest.split(".", 2)
            rest = f"layers.{self._chosen[int(index)]}.{leaf}"
        return f"{self.prefix}.{rest}"
