"""System programs that tests run; a test skips with a message if one is missing."""

from __future__ import annotations

import shutil

import pytest


def require_package(name: str, package: str) -> str:
    """Return the path of a program that `make` does not install; skip the test if it is missing.

    Args:
        package: Debian package that contains it, for the message.
    """
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed ({package})")
    return path
