"""The demonstration model's file: fetched once, then taken from the user's cache as the product does."""

from __future__ import annotations

import functools

from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.settings import DEMO_MODEL, Settings


@functools.cache
def demo_files() -> ModelFiles:
    """Return where the demonstration model lies."""
    return resolve(Settings(model_id=DEMO_MODEL), lambda stage, done, total: None)
