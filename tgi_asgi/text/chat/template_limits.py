"""No expression of a chat template makes a value out of proportion: `"x" * 10**10` is refused, not tried.

The sandbox keeps templates away from Python; this keeps them from taking the machine's memory. What a
template writes in all is `chat.py`'s to limit, how long a range is `sandbox.py`'s, how long all of it takes
`time_limit.py`'s; `template_filters.py` has the filters.
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

from tgi_asgi.text.chat.time_limit import TICK, TickingLoops, tick, tick_filter, ticking

MAX_CHARS = 1 << 25  # of one text, or elements of one list
_MAX_ITEMS = 1 << 20  # of lists and dicts within each other, as text
_MAX_WIDTH = 10_000  # that a text is padded to
_MAX_BITS = 4096  # of a number
_NUMBER = re.compile(r"\d+")


def concat(values: Iterable[Any]) -> str:
    """Join texts, unless that would be too long."""
    texts = [text_of(value) for value in values]
    check_size(sum(map(len, texts)))
    return "".join(texts)


def text_of(value: Any) -> str:
    """Return `str(value)`, unless that would be too long."""
    check_text(value)
    return str(value)


def check_text(value: Any) -> None:
    """Refuse what is too long as text: a few lists that hold each other may be billions of items."""
    if isinstance(value, str):
        return
    size, num_items, stack = 0, 0, [value]
    while stack:
        item = stack.pop()
        num_items += 1
        if num_items > _MAX_ITEMS:
            raise SecurityError(f"a chat template writes values of at most {_MAX_ITEMS} items")
        if isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, str):
            size += len(item)
            check_size(size)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which operators, joins and string methods tick and check the size of what they make."""

    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"+", "*", "**", "%"})  # type: ignore[misc]

    concat = staticmethod(concat)  # of set blocks and macros

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_finalize, **options)
        filters = {**self.filters, "_concat": concat}
        self.filters = {name: ticking(function) for name, function in filters.items()}
        self.filters[TICK] = tick_filter

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped: Callable[..., str] | None = super().wrap_str_format(value)
        if wrapped is None:
            return None
        check_format(value.__self__)

        def checked(*args: Any, **kwargs: Any) -> str:
            check_text([args, kwargs])
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        tick()
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as jinja
        tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, getattr(__obj, "__name__", ""), args)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = TickingLoops().visit(
            _Concat().visit(super()._parse(source, name, filename))
        )
        return tree


class _Concat(NodeTransformer):
    """Let `a ~ b` go through our join, too."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        values = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(values, "_concat", [], [], None, None, lineno=node.lineno)


def _finalize(value: Any) -> Any:
    """Pass what `{{ }}` is about to write as text: most often it is one."""
    if value.__class__ is not str:
        check_text(value)
    return value


def _check_binop(operator: str, left: Any, right: Any) -> None:
    sizes = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
    numbers = [int(value) for value in (left, right) if isinstance(value, int)]
    if operator == "+":
        check_size(sum(sizes))
    elif operator == "*" and sizes:
        check_size(sizes[0] * max(numbers, default=0))
    elif operator == "*":
        _check_bits(sum(number.bit_length() for number in numbers))
    elif operator == "**" and len(numbers) == 2:
        _check_bits(numbers[0].bit_length() * abs(numbers[1]))
    elif operator == "%" and isinstance(left, str):
        check_format(left)
        check_text(right)


def _check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        for arg in args:
            check_width(arg)
    elif name == "replace" and len(args) >= 2:
        check_size((len(text) + 1) * max(len(str(args[1])), 1))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        check_size(sum(len(item) + len(text) for item in args[0] if isinstance(item, str)))
    elif name == "translate":
        raise SecurityError("a chat template must not call translate")


def check_format(text: str) -> None:
    """Refuse widths that are too large, or that come from a value."""
    if "%*" in text or ":{" in text or ">{" in text or "<{" in text or "^{" in text:
        raise SecurityError("a chat template's format must not take widths from values")
    for number in _NUMBER.findall(text):
        check_width(int(number) if len(number) < 9 else _MAX_WIDTH + 1)


def check_width(width: Any) -> None:
    """Refuse to pad, to batch or to slice by more than any template needs."""
    if isinstance(width, int) and width > _MAX_WIDTH:
        raise SecurityError(f"a chat template pads to at most {_MAX_WIDTH} characters")


def check_size(size: int) -> None:
    """Refuse a text or list that is too long."""
    if size > MAX_CHARS:
        raise SecurityError(f"a chat template made a text or list of more than {MAX_CHARS} elements")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"a chat template made a number of more than {_MAX_BITS} bits")
