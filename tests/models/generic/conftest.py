"""The tiny checkpoints of all architectures, made when a test first asks for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import architectures
from tgi_asgi import ops


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread: threads that wait for each other make tiny models ten times slower."""
    ops.configure_threads(1, nice=0, pin=False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the directory of a type's checkpoint; tests only read it."""
    root = tmp_path_factory.mktemp("architectures")

    def of_type(model_type: str) -> Path:
        folder = root / model_type
        if not (folder / "config.json").exists():
            architectures.make(model_type, folder)
        return folder

    return of_type
