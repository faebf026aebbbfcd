"""Read the scales of keys and values that a checkpoint was calibrated with, for an FP8 cache.

    model.layers.3.self_attn.k_scale, .v_scale              compressed-tensors, FBGEMM, Quark
    model.layers.3.self_attn.k_proj.k_scale, v_proj.v_scale ModelOpt
    model.layers.3.self_attn.k_proj.output_scale            older compressed-tensors
    model.layers.3.self_attn.kv_scale                       AutoFP8, for both

Stored values are divided by their scale. A kernel uses one scale per layer; scales per head are accepted only
if all are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError

_Read = Callable[[str], tuple[str, npt.NDArray[Any]] | None]
_NAMES = {
    "k": ("k_scale", "k_proj.k_scale", "qkv_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    "v": ("v_scale", "v_proj.v_scale", "qkv_proj.v_scale", "v_proj.output_scale", "kv_scale"),
}


def read_kv_scales(read: _Read, num_layers: int) -> list[tuple[float, float]]:
    """Return each layer's scales of keys and of values; 1 if the files have none.

    Args:
        read: Returns the file's name and the values of a canonical tensor; None if it does not exist.

    Raises:
        ModelLoadError: if a scale is not a positive number, heads have different scales, or two names have
            different values.
    """
    return [(_find(read, index, "k"), _find(read, index, "v")) for index in range(num_layers)]


def _find(read: _Read, layer: int, kind: str) -> float:
    """Return the scale of a layer's keys or values."""
    found: dict[str, float] = {}
    for name in _NAMES[kind]:
        tensor = read(f"model.layers.{layer}.self_attn.{name}")
        if tensor is not None:
            found[tensor[0]] = _one(*tensor)
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name!r} ({value:g})" for name, value in found.items())
        raise ModelLoadError(f"{said} contradict each other: the scale of the cache is ambiguous")
    return next(iter(found.values()), 1.0)


def _one(name: str, values: npt.NDArray[Any]) -> float:
    distinct = np.unique(values)
    if len(distinct) > 1:
        raise ModelLoadError(
            f"{name!r} has {values.size} scales of keys or values, but the cache uses one per layer: use "
            "--kv-cache-dtype auto"
        )
    if len(distinct) == 0 or not np.isfinite(distinct[0]) or distinct[0] <= 0:
        raise ModelLoadError(
            f"{name!r} is {distinct.tolist()}, but a scale of the cache must be a positive number: use "
            "--kv-cache-dtype auto"
        )
    return float(distinct[0])
