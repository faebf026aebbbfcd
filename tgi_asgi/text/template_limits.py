"""No expression of a chat template makes a value out of proportion: `"x" * 10**10` is refused, not tried.

The sandbox keeps templates away from Python; this keeps them from taking the machine's memory. What a
template writes in all is `chat.py`'s to limit, how long a range is `sandbox.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARS = 1 << 25  # of one text, or elements of one list
_MAX_WIDTH = 10_000  # that a text is padded to
_MAX_BITS = 4096  # of a number
_NUMBER = re.compile(r"\d+")


def concat(values: Iterable[Any]) -> str:
    """Join texts, unless that would be too long."""
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which operators, joins and string methods check the size of what they are to make."""

    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"+", "*", "**", "%"})  # type: ignore[misc]

    concat = staticmethod(concat)  # of set blocks and macros

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["_concat"] = concat
        self.filters["center"] = _center

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped: Callable[..., str] | None = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as jinja
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, getattr(__obj, "__name__", ""), args)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Concat().visit(super()._parse(source, name, filename))
        return tree


class _Concat(NodeTransformer):
    """Let `a ~ b` go through our join, too."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        values = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(values, "_concat", [], [], None, None, lineno=node.lineno)


def _center(value: Any, width: int = 80) -> str:
    _check_width(width)
    return str(value).center(width)


def _check_binop(operator: str, left: Any, right: Any) -> None:
    sizes = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
    numbers = [int(value) for value in (left, right) if isinstance(value, int)]
    if operator == "+":
        _check_size(sum(sizes))
    elif operator == "*" and sizes:
        _check_size(sizes[0] * max(numbers, default=0))
    elif operator == "*":
        _check_bits(sum(number.bit_length() for number in numbers))
    elif operator == "**" and len(numbers) == 2:
        _check_bits(numbers[0].bit_length() * abs(numbers[1]))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)


def _check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        for arg in args:
            _check_width(arg)
    elif name == "replace" and len(args) >= 2:
        _check_size((len(text) + 1) * max(len(str(args[1])), 1))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        _check_size(sum(len(item) + len(text) for item in args[0] if isinstance(item, str)))
    elif name == "translate":
        raise SecurityError("a chat template must not call translate")


def _check_format(text: str) -> None:
    if "%*" in text or ":{" in text or ">{" in text or "<{" in text or "^{" in text:
        raise SecurityError("a chat template's format must not take widths from values")
    for number in _NUMBER.findall(text):
        _check_width(int(number) if len(number) < 9 else _MAX_WIDTH + 1)


def _check_width(width: Any) -> None:
    if isinstance(width, int) and width > _MAX_WIDTH:
        raise SecurityError(f"a chat template pads to at most {_MAX_WIDTH} characters")


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"a chat template made a text or list of more than {MAX_CHARS} elements")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"a chat template made a number of more than {_MAX_BITS} bits")
