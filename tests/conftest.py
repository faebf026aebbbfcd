"""Fixtures for all tests, and the rules of a run: which tests run, for how long, and which may skip."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# torch's threads spin while they wait for each other: on two cores shared with servers and their thread
# pools, references took up to ten times as long. Set it before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.emulation import library
from tests.support.garbage import Garbage
from tests.support.llama_cpp import package_source
from tests.support.loggers import Loggers
from tests.support.reports import Reports
from tests.support.scale import Scale
from tests.support.selection import Selection
from tests.support.skips import Skips
from tests.support.time_limit import TimeLimit
from tests.support.vllm import vllm_templates
from tgi_asgi import _C
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.settings import DEMO_MODEL, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("nightly_markers", "left out unless -m names them", type="args")


def pytest_configure(config: pytest.Config) -> None:
    # The other worker's tests need the cores: with the usual millisecond, tests of operators took 1.7 times
    # the processor time (bench/results/team-yield.json).
    _C.team_yield_after(20)
    # Beside another worker's tests, an example may take longer than the 200 ms that hypothesis allows it.
    hypothesis.settings.register_profile("tgi_asgi", deadline=None)
    hypothesis.settings.load_profile("tgi_asgi")
    nightly = config.getini("nightly_markers")
    config.pluginmanager.register(Selection(nightly))
    config.pluginmanager.register(TimeLimit(nightly))
    config.pluginmanager.register(Garbage())
    config.pluginmanager.register(Loggers())
    if not hasattr(config, "workerinput"):  # only pytest-xdist's controller sees all tests
        config.pluginmanager.register(Skips())
        config.add_cleanup(library.discard_old)
    elif not Reports.are_all_wanted(config):
        config.pluginmanager.register(Reports())


@pytest.fixture(scope="session")
def demo_files() -> ModelFiles:
    """Return the demonstration model, fetched on first use as the server fetches it (98 MB, cached)."""
    try:
        return resolve(Settings(model_id=DEMO_MODEL))
    except ModelLoadError as error:
        pytest.skip(f"the demonstration model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def demo_gguf(demo_files: ModelFiles) -> Path:
    """Return the demonstration model's file."""
    return demo_files.path


@pytest.fixture(scope="session")
def llama_cpp_package() -> Path:
    """Return the sources of llama.cpp's Python package, fetched once into build/ (77 MB)."""
    return package_source()


@pytest.fixture(scope="session")
def llama_cpp(llama_cpp_package: Path) -> Path:
    """Return llama.cpp's own sources in it: vocabularies with test vectors, chat templates, converter."""
    return llama_cpp_package / "vendor" / "llama.cpp"


@pytest.fixture(scope="session")
def vllm_examples() -> Path:
    """Return vLLM's chat templates for tools, fetched once into build/ (47 MB)."""
    return vllm_templates()


@pytest.fixture
def restored_loggers() -> Iterator[None]:
    """Restore the handlers and levels that the server sets."""
    loggers = [logging.getLogger(), logging.getLogger("tgi_asgi")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers = handlers
        logger.setLevel(level)


@pytest.fixture(params=["small", pytest.param("full", marks=pytest.mark.soak)])
def scale(request: pytest.FixtureRequest) -> Scale:
    """Run a long test at both sizes; the full size runs only in `make soak`."""
    return Scale(is_full=request.param == "full")
