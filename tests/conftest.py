"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# torch's threads wait for each other by spinning: on two cores, beside servers and teams of their own,
# references took up to ten times as long. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.scale import Scale
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import resolve
from tgi_asgi.settings import DEMO_MODEL, Settings


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demonstration model's file, fetched on first use just as the server fetches it (98 MB, cached)."""
    try:
        return resolve(Settings(model_id=DEMO_MODEL), lambda stage, done, total: None).path
    except ModelLoadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the demonstration model cannot be fetched: {error}")


@pytest.fixture(params=["small", pytest.param("full", marks=pytest.mark.soak)])
def scale(request: pytest.FixtureRequest) -> Scale:
    """Run a long test at both sizes; the full one only in `make soak`."""
    return Scale(is_full=request.param == "full")
