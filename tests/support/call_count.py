"""Counts the calls of a method, for code that says of no caller how much it has done."""

from __future__ import annotations

import functools
from typing import Any

import pytest


class CallCount:
    """The number of calls of a method since `count_calls`."""

    __slots__ = ("num",)

    def __init__(self) -> None:
        self.num = 0


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> CallCount:
    """Count the calls of a class's method from now on."""
    count, method = CallCount(), getattr(owner, name)

    @functools.wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count.num += 1
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return count
