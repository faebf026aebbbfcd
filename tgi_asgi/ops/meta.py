"""Typed access to torch's registration of meta functions, which check shapes where there is no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def meta_of(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function as the meta function of the operator `tgi::name`.

    Operators write to tensors they are given, so a meta function has shapes to check and nothing to return.
    """
    register: Any = torch.library.register_fake

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        register(f"tgi::{name}", function)
        return function

    return decorate


def require(holds: bool) -> None:
    """Refuse operands whose shapes do not fit together."""
    check: Any = torch._check
    check(holds)
