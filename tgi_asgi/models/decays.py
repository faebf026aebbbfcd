"""The decays of recurrent layers (A of Mamba and of gated delta nets), as files store them."""

from __future__ import annotations

import numpy as np

from tgi_asgi import ops
from tgi_asgi.models.layer_tensors import LayerTensors
from tgi_asgi.ops.arrays import Floats


def stored_decays(weights: LayerTensors, part: str, *shape: int) -> Floats:
    """Return A of a layer's part of this name, flat: GGUF files have A itself, checkpoints log(-A)."""
    if weights.has(f"{part}.A"):
        return ops.vector(weights.get(f"{part}.A", *shape))
    return decays_of(ops.vector(weights.get(f"{part}.A_log", *shape)))


def decays_of(logs: Floats) -> Floats:
    """Return A for log(-A).

    In float64, because NumPy's exp of float32 rounds differently on x86-64 and on Arm, and a model's tokens
    should not depend on that.
    """
    return -np.exp(logs.astype(np.float64)).astype(np.float32)
