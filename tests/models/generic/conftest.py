"""The tiny checkpoints of all architectures, made when a test first asks for one, and how they are run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import architectures, gguf_vision, vision_models
from tests.support.call_count import CallCount, count_calls
from tests.support.gguf_vision import Made
from tgi_asgi import ops
from tgi_asgi.models.generic.common import CommonDecoder
from tgi_asgi.models.generic.vision.tower import Tower


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread: threads that wait for each other make tiny models ten times slower."""
    ops.configure_threads(1, nice=0, pin=False)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> CallCount:
    """The number of images that towers have begun to encode."""
    return count_calls(monkeypatch, Tower, "begin")


@pytest.fixture
def computed_pieces(monkeypatch: pytest.MonkeyPatch) -> CallCount:
    """The number of pieces that towers have computed: after each, a tower asks whether it is late."""
    return count_calls(monkeypatch, Tower, "_stop_if_late")


@pytest.fixture
def as_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code of `transformers` run models that a native decoder would otherwise run."""
    monkeypatch.setattr(CommonDecoder, "find", lambda *_: None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return architectures.made_once(tmp_path_factory.mktemp("architectures"), architectures.make)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return a function that makes each case of `gguf_vision` once."""
    made: dict[str, Made] = {}

    def model(name: str) -> Made:
        vision_models.require_processor(name)
        if name not in made:
            made[name] = gguf_vision.make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return model


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes the checkpoint of each family of `vision_table` once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        vision_models.require_processor(name)
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            vision_models.make(name, made[name])
        return made[name]

    return folder
