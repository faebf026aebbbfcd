"""Keeps Python's collector away from what a run needs to its end: 15,000 tests and the modules they import.

A worker has a million such objects. To look at them all takes half a second, and a twelfth of the time of
tests/api and tests/text went into it. pytest itself makes hundreds of objects a test: with Python's threshold
of 700, it is at the youngest objects once a test, and the collector took an eighth of an empty test's time.

    config.pluginmanager.register(Garbage())
"""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest


class Garbage:
    """Collect nothing while tests are found, and never look at them afterwards."""

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        gc.disable()
        try:
            return (yield)
        finally:
            gc.collect()
            gc.freeze()
            gc.set_threshold(10_000, 10, 10)
            gc.enable()
