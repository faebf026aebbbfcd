"""Checkpoints of a model without its head, as embedding models are saved: names lack their `model.`."""

from __future__ import annotations

from tgi_asgi.models.loading import Weights
from tgi_asgi.ops import WeightSource

_PREFIX = "model."
_PROBE = "embed_tokens.weight"


def with_prefix(weights: Weights) -> Weights:
    """Return the weights by their canonical names, whichever the files have."""
    is_bare = _PROBE in weights and _PREFIX + _PROBE not in weights
    return BareWeights(weights) if is_bare else weights


class BareWeights:
    """`Weights` whose files have `layers.0...` for `model.layers.0...`."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.num_bytes = weights.num_bytes

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.removeprefix(_PREFIX) in self._weights

    def get(self, name: str, shape: tuple[int, ...]) -> WeightSource:
        """Return a tensor, as `Weights.get` says."""
        return self._weights.get(name.removeprefix(_PREFIX), shape)

    def unread(self) -> list[str]:
        """Return what nobody has asked for, as `Weights.unread` says."""
        return self._weights.unread()

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as `Weights.stored` says."""
        return self._weights.stored()

    def close(self) -> None:
        """Unmap the files."""
        self._weights.close()
