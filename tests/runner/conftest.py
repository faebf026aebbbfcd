"""Runners for the tests of a module with a fixture `model`, closed after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ops.conftest import kernel_set
from tests.support.small_engine import small_runner
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.models.family import Model
from tgi_asgi.runner.runner import HostRunner

__all__ = ["kernel_set", "make_runner", "runner"]


@pytest.fixture
def make_runner(model: Model) -> Iterator[Callable[..., HostRunner]]:
    """Return a function that makes a small runner for the module's model or another."""
    runners: list[HostRunner] = []

    def make(model: Model = model) -> HostRunner:
        runners.append(small_runner(model, 64, max_context=256))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


@pytest.fixture
def runner(make_runner: Callable[..., HostRunner]) -> HostRunner:
    return make_runner()


@pytest.fixture
def drafts_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as many tokens as possible regardless of their cost, so that the tests exercise drafts."""
    monkeypatch.setattr(TokenBudget, "cost_s", property(lambda budget: (1.0, 0.0)))
