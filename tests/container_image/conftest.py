"""Requirements of the container tests on this machine, and the folders they use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.container_image.container import TOOLS, make_base
from tests.support.installing import pinned_torch


@pytest.fixture(scope="session")
def base() -> None:
    """Make the base image; skip if this machine cannot (in CI: fail)."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    reason = f"{', '.join(missing)} not found" if missing else "needs root" if os.geteuid() else ""
    if reason and os.environ.get("CI"):
        raise RuntimeError(reason)
    if reason:
        pytest.skip(reason)
    make_base()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with torch's CPU build for Debian 12's Python, from pip's configured index."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--python-version=3.11", f"--dest={folder}", pinned_torch()], check=True)
    return folder
