"""Decays of recurrent layers, computed from what checkpoints store."""

from __future__ import annotations

import math

import numpy as np

from tgi_asgi.models.decays import decays_of


def test_decays_are_the_nearest_floats_on_any_processor() -> None:
    """NumPy's exp of float32 is not: it differs in a few per cent of these."""
    logs = np.random.default_rng(0).uniform(-3, 3, 2000).astype(np.float32)
    expected = [np.float32(-math.exp(each)) for each in logs.tolist()]
    assert decays_of(logs).tolist() == [float(each) for each in expected]
