"""Limit the time that a chat template may compute, in loops without output or macros that call each other.

    with limited_time():
        template.render(...)  # SecurityError once its thread has computed for too long

Every iteration of a loop and every call passes `tick`, which checks the clock now and then.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import jinja2.nodes
from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

MAX_CPU_S = 10.0  # 16 MiB of the shortest messages take half of it
TICK = "_tick"
_STRIDE = 64  # ticks between two checks of the clock, which take 0.3 us


class _Clock(threading.local):
    left = _STRIDE
    ends_s = math.inf


_clock = _Clock()


@contextmanager
def limited_time() -> Iterator[None]:
    """Let this thread tick for `MAX_CPU_S` of its own processor time."""
    _clock.ends_s = time.thread_time() + MAX_CPU_S
    try:
        yield
    finally:
        _clock.ends_s = math.inf


def tick() -> None:
    """Check the clock if it is due.

    Raises:
        SecurityError: if the template has computed for too long.
    """
    _clock.left -= 1
    if _clock.left < 0:
        _clock.left = _STRIDE
        if time.thread_time() > _clock.ends_s:
            raise SecurityError(f"a chat template computed for more than {MAX_CPU_S:g} s")


@pass_context  # without it, jinja would call the filter once, at compile time
def tick_filter(context: Context, value: Any) -> bool:
    """Tick as a filter, under a name that no template can use; returns True, for conditions."""
    tick()
    return True


class TickingLoops(NodeTransformer):
    """A transformer that adds a tick to each iteration of a loop, and to each item that it skips."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(_tick_node(node), lineno=node.lineno))
        if node.test is not None:
            node.test = jinja2.nodes.And(_tick_node(node), node.test, lineno=node.lineno)
        return node


def _tick_node(at: jinja2.nodes.Node) -> jinja2.nodes.Expr:
    nothing = jinja2.nodes.Const(None, lineno=at.lineno)
    return cast(jinja2.nodes.Expr, jinja2.nodes.Filter(nothing, TICK, [], [], None, None, lineno=at.lineno))
