"""A model's files of either format, opened, and their weights by canonical names."""

from tgi_asgi.models.loading.weights import KEPT, ORDERED, WHOLE, NamedWeights, Weights

__all__ = ["KEPT", "ORDERED", "WHOLE", "NamedWeights", "Weights"]
