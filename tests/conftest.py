"""What all tests share: fixtures, and the rules of a run (which tests, how long each, which may skip)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# torch's threads wait for each other by spinning: on two cores, beside servers and teams of their own,
# references took up to ten times as long. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.llama_cpp import package_source
from tests.support.scale import Scale
from tests.support.selection import Selection
from tests.support.skips import Skips
from tests.support.time_limit import TimeLimit
from tests.support.vllm import vllm_templates
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.settings import DEMO_MODEL, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("nightly_markers", "left out unless -m names them", type="args")


def pytest_configure(config: pytest.Config) -> None:
    nightly = config.getini("nightly_markers")
    config.pluginmanager.register(Selection(nightly))
    config.pluginmanager.register(TimeLimit(nightly))
    if not hasattr(config, "workerinput"):  # of pytest-xdist's, the one process that hears of all tests
        config.pluginmanager.register(Skips())


@pytest.fixture(scope="session")
def demo_files() -> ModelFiles:
    """The demonstration model, fetched on first use just as the server fetches it (98 MB, cached)."""
    try:
        return resolve(Settings(model_id=DEMO_MODEL), lambda stage, done, total: None)
    except ModelLoadError as error:
        pytest.skip(f"the demonstration model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def demo_gguf(demo_files: ModelFiles) -> Path:
    """Its file."""
    return demo_files.path


@pytest.fixture(scope="session")
def llama_cpp_package() -> Path:
    """The sources of llama.cpp's Python package, fetched once into build/ (77 MB)."""
    return package_source()


@pytest.fixture(scope="session")
def llama_cpp(llama_cpp_package: Path) -> Path:
    """Those of llama.cpp itself, within: vocabularies with test vectors, chat templates, the converter."""
    return llama_cpp_package / "vendor" / "llama.cpp"


@pytest.fixture(scope="session")
def vllm_examples() -> Path:
    """vLLM's chat templates for tools, fetched once into build/ (47 MB)."""
    return vllm_templates()


@pytest.fixture(params=["small", pytest.param("full", marks=pytest.mark.soak)])
def scale(request: pytest.FixtureRequest) -> Scale:
    """Run a long test at both sizes; the full one only in `make soak`."""
    return Scale(is_full=request.param == "full")
