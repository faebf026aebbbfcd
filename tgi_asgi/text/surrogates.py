"""Halves of surrogate pairs: JSON can escape them, and models do, but no UTF-8 text can hold them."""

from __future__ import annotations

import json
import re
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")


def dumped(value: Any) -> str:
    """Return JSON with all characters as they are, except for halves of pairs, which are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if _HALF.search(text) else text


def parsed(text: str) -> Any:
    """Return the value of JSON, with U+FFFD for each half of a pair.

    Raises:
        ValueError: if it is not JSON.
        RecursionError: if it nests too deep.
    """
    value = json.loads(text)
    if "\\u" not in text or not _HALF.search(again := json.dumps(value, ensure_ascii=False)):
        return value
    return json.loads(again.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
