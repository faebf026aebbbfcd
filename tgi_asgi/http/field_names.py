"""What a field of chat completions is called in the API that a request came from.

`/v1/responses` and `/v1/messages` are served as chat completions; their clients know other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tgi_asgi.errors import InvalidRequest

_QUOTED = re.compile(r"`([\w.\[\]]+)`")  # messages write paths of fields like this
_NESTED_TOOL = re.compile(r"^(tools\[\d+\])\.function\b")  # elsewhere tools are flat


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Say in refusals what the client calls a field, in `param` and in the text.

    Args:
        names: by chat's name of a top-level field; others are called the same.
    """
    try:
        yield
    except InvalidRequest as error:
        error.message = _QUOTED.sub(lambda match: f"`{_renamed(match[1], names)}`", error.message)
        if error.param is not None:
            error.param = _renamed(error.param, names)
        raise


def _renamed(path: str, names: Mapping[str, str]) -> str:
    path = re.sub(r"^\w+", lambda match: names.get(match[0], match[0]), path)
    return _NESTED_TOOL.sub(r"\1", path)
