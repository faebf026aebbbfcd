"""jinja's filters that can make much out of little, with the limits of `template_limits.py`.

`SAFE_FILTERS` replaces them by name; signatures are jinja's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2.filters
from jinja2 import Environment, pass_environment, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext

from tgi_asgi.text.chat.template_limits import check_format, check_size, check_text, check_width, text_of


def _center(value: Any, width: int = 80) -> str:
    check_width(width)
    return str(value).center(width)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    s = str(s)
    check_width(width)
    check_size((s.count("\n") + 1) * (len(width) if isinstance(width, str) else width) + len(s))
    return jinja2.filters.do_indent(s, width, first, blank)


@pass_eval_context
def _replace(context: EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    s, old, new = str(s), str(old), str(new)
    check_size(len(s) + s.count(old) * len(new))
    return jinja2.filters.do_replace(context, s, old, new, count)


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    getter = jinja2.filters.make_attrgetter(environment, attribute) if attribute is not None else None
    texts: list[str] = []
    separator, size = str(d), 0
    for item in value:
        texts.append(text_of(item if getter is None else getter(item)))
        size += len(texts[-1]) + len(separator)
        check_size(size)
    return separator.join(texts)


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    check_width(linecount)
    return jinja2.filters.do_batch(value, linecount, fill_with)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Any:
    check_width(slices)
    return jinja2.filters.sync_do_slice(value, slices, fill_with)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    check_width(abs(precision))
    return jinja2.filters.do_round(value, precision, method)


@pass_environment
def _sum(environment: Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise SecurityError("a chat template sums numbers only")
    return jinja2.filters.sync_do_sum(environment, iterable, attribute, start)


@pass_environment
def _wordwrap(
    environment: Environment,
    s: Any,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> str:
    check_size((len(str(s)) + 1) * len(wrapstring or "\n"))
    return jinja2.filters.do_wordwrap(
        environment, str(s), width, break_long_words, wrapstring, break_on_hyphens
    )


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    check_format(str(value))
    check_text([*args, *kwargs.values()])
    return jinja2.filters.do_format(value, *args, **kwargs)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write a value as transformers' filter does; jinja's own escapes <>&' and sorts keys."""
    check_text(value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    check_width(indent)
    pieces, size = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        size += len(piece)
        check_size(size)
    return "".join(pieces)


SAFE_FILTERS: dict[str, Callable[..., Any]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "pprint": text_of,
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "string": text_of,
    "sum": _sum,
    "tojson": to_json,
    "wordwrap": _wordwrap,
}
