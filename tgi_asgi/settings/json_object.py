"""Command-line options whose value is a JSON object: parsing it, and refusing what it contains."""

from __future__ import annotations

import json
from typing import Any

from tgi_asgi.errors import InvalidRequest

MAX_SHOWN = 200  # characters of a value shown in an error message


def parse_object(option: str, text: str) -> dict[str, Any]:
    """Return the object that is the value of `option`, such as `speculative_config`.

    Raises:
        InvalidRequest: if the text is not JSON, or not an object.
    """
    try:
        given = json.loads(text)
    except RecursionError:
        raise bad_option(option, "be JSON that does not nest deeply", text) from None
    except ValueError as error:
        raise bad_option(option, f"be JSON ({error})", text) from None
    if not isinstance(given, dict):
        raise bad_option(option, "be an object", text)
    return given


def bad_option(option: str, rule: str, value: str) -> InvalidRequest:
    """Return an error that says what the option must do or be, and the beginning of what was given."""
    shown = value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."
    return InvalidRequest(f"--{option.replace('_', '-')} must {rule}, got {shown}")
