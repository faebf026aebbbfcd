"""The jinja2 sandbox of chat templates: the extensions, filters and globals of transformers, with limits.

Templates come from the model or the administrator. They cannot reach Python, loop forever, or exhaust the
machine by a number in an expression: a repetition, a power, a range, a width. How much their loops, `join`
and `replace` make of texts is not limited; the administrator chose the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tgi_asgi.text.chat.time_limit import TICK, TickingLoops, tick, tick_filter
from tgi_asgi.text.chat.widths import METHODS, check_format, check_percent, check_width, limited_filters

MAX_CHARS = 1 << 25  # of a repeated text and of the whole output: twice the default payload limit
MAX_RANGE = 10_000
_MAX_POWER = 1_000  # of base and exponent


class Sandbox(ImmutableSandboxedEnvironment):
    """Transformers' environment, with time checks in loops and calls, and limits on what a number makes."""

    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"*", "**", "%"})  # type: ignore[misc]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str | bytes):
                check_percent(left, right)
            return super().call_binop(context, operator, left, right)
        sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
        if operator == "**" and any(abs(value) > _MAX_POWER for value in sizes):
            raise SecurityError(f"a chat template's power is of numbers up to {_MAX_POWER}")
        if operator == "*" and abs(sizes[0] * sizes[1]) > MAX_CHARS and sizes != [left, right]:
            raise SecurityError(f"a chat template repeats a text to at most {MAX_CHARS} characters")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as in jinja
        tick()
        if getattr(__obj, "__name__", None) in METHODS:
            check_width(*args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            named = args[0].values() if value.__name__ == "format_map" and args else ()
            check_format(value.__self__, (*args, *kwargs.values(), *named))
            return wrapped(*args, **kwargs)

        return checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = TickingLoops().visit(super()._parse(source, name, filename))
        return tree


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; it has no effect on a prompt."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without underscore names, so that none shadows what the sandbox guards."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in jinja: templates may use the name `self`
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, without the class's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute cannot start with an underscore: {name!r}")


def make_environment() -> Sandbox:
    """Return a fresh environment; it keeps the text of `{% generation %}` blocks and ignores the tags."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters |= limited_filters(environment.filters)
    environment.filters |= {"tojson": to_json, "format": _format, TICK: tick_filter}
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "range": _range,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    del environment.globals["lipsum"]  # it generates as many words as requested
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialise a value as transformers' filter does; jinja's own escapes <>&' and sorts keys."""
    check_width(indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    check_percent(text, args or tuple(kwargs.values()))
    return jinja2.filters.do_format(text, *args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise OverflowError(f"a chat template's range has at most {MAX_RANGE} numbers, not {len(numbers)}")
    return numbers
