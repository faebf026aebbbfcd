"""The image, built and run: `make test-image`. Needs Debian, root, and the tools of container.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container_image.container import FOLDER, Container, build, configuration, mounted
from tests.support.installing import ask, copy_context, record
from tests.support.server_process import free_port

pytestmark = pytest.mark.image
START_TIMEOUT_S = 300  # the container fetches the demonstration model


@pytest.fixture(scope="module")
def image(base: None, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    context = tmp_path_factory.mktemp("context")
    copy_context(context)
    shutil.copytree(wheels, context / "wheels")
    start = time.monotonic()
    build(context, "--build-arg", "WHEELS=wheels", "--build-arg", "TORCH_INDEX=")
    record("image", "build", minutes=(time.monotonic() - start) / 60)


@pytest.fixture(scope="module")
def root(image: None) -> Iterator[Path]:
    with mounted() as folder:
        yield folder


@pytest.fixture(scope="module")
def data() -> Path:
    folder = FOLDER / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _megabytes(folder: Path) -> int:
    return int(subprocess.check_output(["du", "-sm", folder], text=True).split()[0])


def test_it_serves_as_any_user_from_a_read_only_root(root: Path, data: Path) -> None:
    with Container(root, data, port=free_port()) as container:
        first_s = container.wait_until_healthy(START_TIMEOUT_S)
        assert "Paris" in ask(container.url)
        assert container.execute("id", "-u").stdout == "1000\n"
        for place in ("/", "/opt/tgi-asgi", "/tmp", "/etc"):
            refused = container.execute("touch", f"{place}/new")
            assert "Read-only file system" in refused.stderr, place
        assert container.execute("touch", "/data/new").returncode == 0
        status = container.execute("sh", "-c", "cat /proc/1/status").stdout
        assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
        size = _megabytes(root)
        assert container.stop() == 0
    with Container(root, data, port=free_port()) as container:
        start_s = container.wait_until_healthy(START_TIMEOUT_S)
        assert container.stop() == 0
    record("image", "run", size_mb=size, first_start_s=first_s, start_s=start_s)


def test_docker_s_health_check_follows_the_server(root: Path, data: Path) -> None:
    check = json.loads(_health_check())
    with Container(root, data, port=free_port()) as container:
        container.wait_until_healthy(START_TIMEOUT_S)
        healthy = container.execute(*check)
        assert healthy.returncode == 0, healthy.stderr
        # Nothing listens on port 1: the check must use the environment's PORT, not the default.
        refused = container.execute("env", "PORT=1", *check)
        assert refused.returncode == 1
        assert "refused" in refused.stderr


def _health_check() -> str:
    """Return the HEALTHCHECK's command from the Dockerfile, because images in OCI's format drop it."""
    text = (Path(__file__).parents[2] / "Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"^HEALTHCHECK .*\\\n\s+CMD (\[.*\])$", text, re.MULTILINE)
    assert found is not None
    return found[1]


def test_it_has_nothing_that_was_needed_only_to_build_it(root: Path) -> None:
    programs = [root / "usr/bin" / name for name in ("gcc", "g++", "make")]
    assert not [path for path in programs if path.exists()]
    (site,) = root.glob("opt/tgi-asgi/lib/python3*/site-packages")
    assert not (site / "torch" / "include").exists()
    for folder in (root / "src", root / "wheels", root / "var/lib/apt/lists/partial"):
        assert not folder.exists()
    assert configuration()["Entrypoint"] == ["tgi-asgi"]
