"""Programs of the system that a test runs, and what the test says where one is missing."""

from __future__ import annotations

import shutil

import pytest


def require_package(name: str, package: str) -> str:
    """Return the path of a program that is no part of what `make` installs; without it the test is skipped.

    Args:
        package: what brings it on Debian, for the message.
    """
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed ({package})")
    return path
