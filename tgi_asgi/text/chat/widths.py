"""Limits of the numbers by which a template's expression makes a text longer: widths, columns, precisions.

The sandbox checks them before the expression is computed.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterable
from typing import Any

from jinja2.exceptions import SecurityError

MAX_WIDTH = 10_000
# Methods of strings, bytes and integers whose results are as long as a number says.
METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"})
_FILTERS = ("batch", "center", "indent", "slice")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")  # width and precision


def check_width(*values: object) -> None:
    """Refuse values if one of them is a number above `MAX_WIDTH`.

    Raises:
        SecurityError: if one is.
    """
    if any(isinstance(value, int) and value > MAX_WIDTH for value in values):
        raise SecurityError(f"a chat template's widths and columns are at most {MAX_WIDTH}")


def check_percent(text: str | bytes, values: object) -> None:
    """Check the widths in a text to the left of `%`, and the numbers to its right if one may be a width."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    sizes = [size for sizes in _PERCENT.findall(text) for size in sizes if size]
    check_width(*(int(size) for size in sizes if size != "*"))
    if "*" in sizes:
        check_width(*(values if isinstance(values, tuple) else (values,)))


def check_format(text: str, values: Iterable[object]) -> None:
    """Check the widths in a text for `str.format`, and the numbers given to it if one may be a width."""
    values = list(values)
    for _, _, spec, _ in string.Formatter().parse(text):
        check_width(*map(int, re.findall(r"\d+", spec or "")), *(values if "{" in (spec or "") else ()))


def limited_filters(filters: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return those of jinja's filters that take widths or columns, with their arguments checked."""
    return {name: _limited(filters[name]) for name in _FILTERS}


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # also copies the attributes by which jinja knows what to pass
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_width(*args[1:], *kwargs.values())
        return function(*args, **kwargs)

    return checked
