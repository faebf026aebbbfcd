"""The jinja2 sandbox of chat templates: the extensions, filters and globals of transformers, with limits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.exceptions import SecurityError

from tgi_asgi.text.chat.template_filters import SAFE_FILTERS
from tgi_asgi.text.chat.template_limits import LimitedEnvironment
from tgi_asgi.text.chat.time_limit import ticking

MAX_RANGE = 10_000


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; for a prompt it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without underscore names, so that none shadows what the sandbox guards."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja: `self` is a name templates may use
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, with none of the class's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute cannot start with an underscore: {name!r}")


def make_environment() -> LimitedEnvironment:
    """Return a fresh environment; it keeps the text of `{% generation %}` blocks and ignores the tags."""
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters.update((name, ticking(function)) for name, function in SAFE_FILTERS.items())
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "range": _range,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    del environment.globals["lipsum"]  # as many words as it is asked for
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise OverflowError(f"a chat template's range has at most {MAX_RANGE} numbers, not {len(numbers)}")
    return numbers
