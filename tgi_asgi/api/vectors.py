"""Operations on result vectors: truncation, normalisation, encoding, and scores of pairs."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import orjson

from tgi_asgi.api.parse import refuse_field
from tgi_asgi.model_info import Activation, Embedding

if TYPE_CHECKING:
    from tgi_asgi.types import Vector


def check_dimensions(dimensions: int | None, embedding: Embedding) -> None:
    """Refuse more dimensions than the model has."""
    if dimensions is not None and not 1 <= dimensions <= embedding.dimensions:
        refuse_field("dimensions", f"must be in 1..{embedding.dimensions}, got {dimensions}")


def shape_vector(vector: Vector, dimensions: int | None, *, is_normalized: bool) -> Vector:
    """Return a vector's first dimensions (Matryoshka embeddings: Kusupati et al., 2022), or all of them.

    `is_normalized` scales the result to length 1; a zero vector stays as it is.
    """
    if not is_normalized:
        return vector[:dimensions]
    wide = vector[:dimensions].astype(np.float64)
    length = math.sqrt(float(wide @ wide))
    short: Vector = (wide / length if length else wide).astype(np.float32)
    return short


def as_json(vector: Vector, *, is_base64: bool = False) -> bytes:
    """Return a vector as a JSON array, or as a base64 string of little-endian float32."""
    if is_base64:
        return b'"' + base64.b64encode(vector.astype("<f4").tobytes()) + b'"'
    return orjson.dumps(np.ascontiguousarray(vector), option=orjson.OPT_SERIALIZE_NUMPY)


def cosine(a: Vector, b: Vector) -> float:
    """Return the cosine of the angle between two vectors; 0 if one has no length."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / lengths if lengths else 0.0


def logit_of(values: Vector) -> float:
    """Return a score's only logit, or the second logit minus the first."""
    return float(values[-1]) - (float(values[0]) if len(values) > 1 else 0.0)


def probability(logit: float) -> float:
    """Return the sigmoid; for the difference of two logits this equals the softmax."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    odds = math.exp(logit)  # of a negative number, so it cannot overflow
    return odds / (1 + odds)


def activate(logits: Vector, activation: Activation) -> list[float]:
    """Return the scores of a classifier's labels."""
    match activation:
        case Activation.IDENTITY:
            return [float(logit) for logit in logits]
        case Activation.SIGMOID:
            return [probability(float(logit)) for logit in logits]
        case Activation.SOFTMAX:
            odds = np.exp(logits.astype(np.float64) - float(logits.max()))
            return [float(each) for each in odds / odds.sum()]


def best_first(scores: Sequence[float], top_n: int | None = None) -> list[int]:
    """Return the indices of scores, best first; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
