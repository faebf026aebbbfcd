"""Each way to install, on a Debian with only the packages that README names: `make test-image`."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.container_image.container import BASE, CERTIFICATES, buildah, buildah_command
from tests.support.installing import (
    ROOT,
    WAYS,
    copy_tracked,
    end_group,
    install_and_ask,
    make_repository,
    pinned_torch,
    record,
)

pytestmark = pytest.mark.image
# README's packages, and those for installing otherwise than by `make serve`: git, and certificates for
# indexes.
PACKAGES = re.search(r"apt-get install ([a-z0-9 -]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
INSTALL = f"git ca-certificates {PACKAGES[1] if PACKAGES else ''}"
PREPARED = f"localhost/debian-to-build:{hashlib.sha256(INSTALL.encode()).hexdigest()[:16]}"


class Debian:
    """A fresh container of the image `PREPARED`; `given` is mounted as /given."""

    name = "clean Debian"

    def __init__(self, given: Path) -> None:
        self._given = given
        self._container = buildah("from", PREPARED)

    def close(self) -> None:
        """Remove the container and all that was installed in it."""
        buildah("rm", self._container)

    def run(self, script: str) -> str:
        """Run a shell script in the container's folder; return its output, or fail with it."""
        done = subprocess.run(self._command(script, {}), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def start(self, script: str, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Start a script; on exit, end it and every process it started."""
        process = subprocess.Popen(self._command(script, environ), start_new_session=True)
        try:
            yield process
        finally:
            end_group(process)

    def _command(self, script: str, environ: dict[str, str]) -> list[str]:
        given = {
            "SOURCE": "/given/source", "REPOSITORY": "/given/repository", "HOME": "/root",
            "PIP_CONSTRAINT": "/given/constraint.txt", "PIP_FIND_LINKS": "/given/wheels",
            "UV_FIND_LINKS": "/given/wheels", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip
        if "PIP_CERT" in os.environ:
            given["SSL_CERT_FILE"] = CERTIFICATES  # uv does not read pip's configuration
        options = [f"--env={name}={value}" for name, value in (given | environ).items()]
        options += ["--isolation=chroot", "--workingdir=/root", f"--volume={self._given}:/given"]
        return buildah_command("run", *options, self._container, "--", "bash", "-ec", script)


@pytest.fixture(scope="module")
def prepared(base: None) -> None:
    """Make the image `PREPARED`, unless an earlier run has made it."""
    assert PACKAGES is not None
    if PREPARED in buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        return
    container = buildah("from", BASE)
    start = time.monotonic()
    install = f"apt-get update && apt-get install --yes --no-install-recommends {INSTALL}"
    buildah("run", "--isolation=chroot", container, "--", "sh", "-ec", install)
    record("clean Debian", "apt-get", minutes=(time.monotonic() - start) / 60)
    buildah("commit", "--quiet", "--rm", container, PREPARED)


@pytest.fixture(scope="module")
def given(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    copy_tracked(folder / "source")
    copy_tracked(folder / "repository")
    make_repository(folder / "repository")
    shutil.copytree(wheels, folder / "wheels")
    (folder / "constraint.txt").write_text(f"{pinned_torch()}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_what_is_installed_serves_the_demonstration_model(prepared: None, given: Path, way: str) -> None:
    machine = Debian(given)
    try:
        install_and_ask(machine, way)
    finally:
        machine.close()
