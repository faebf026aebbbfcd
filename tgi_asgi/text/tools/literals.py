"""Values as models write them: JSON, or Python literals mixed with JSON's constants."""

from __future__ import annotations

import ast
import json
import math
from typing import Any

from tgi_asgi.text.surrogates import dumped

_CONSTANTS = {"true": True, "false": False, "null": None}


class Nesting:
    """The nesting of brackets and quotes in a text that is read by the character."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    @property
    def is_in_string(self) -> bool:
        """Whether a quote is open."""
        return bool(self._quote)

    def push(self, character: str) -> int:
        """Process a character; return how many brackets are open after it, plus one inside quotes."""
        if self._is_escaped:
            self._is_escaped = False
        elif self._quote:
            self._is_escaped = character == "\\"
            if character == self._quote:
                self._quote = ""
        elif character in "\"'":
            self._quote = character
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth -= 1
        return self._depth + bool(self._quote)


class JsonStrings:
    """The strings of a JSON value that is read from a growing text."""

    def __init__(self) -> None:
        self._at = 0
        self._is_open = False
        self._is_escaped = False

    def are_open(self, text: str, at: int) -> bool:
        """Return whether a place, not before the last one asked for, is in a string; none spans lines."""
        if text.lstrip()[:1] not in ("{", "[", '"'):
            return False
        for character in text[self._at : at]:
            if self._is_escaped:
                self._is_escaped = False
            elif character == '"':
                self._is_open = not self._is_open
            elif character == "\n":
                self._is_open = False
            else:
                self._is_escaped = self._is_open and character == "\\"
        self._at = at
        return self._is_open


def literal_value(text: str) -> Any:
    """Return the value that a text stands for; None if JSON has no such value. Strings may span lines."""
    try:
        return json.loads(text, strict=False, parse_float=_finite, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        pass
    try:
        value = _evaluate(ast.parse(_on_one_line(text.strip()), mode="eval").body)
        json.dumps(value, allow_nan=False)  # refuses what only Python has: bytes, sets
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return value


def _finite(number: str) -> float:
    """Return a number; refuse 1e999, which Python reads as infinite and would write as `Infinity`."""
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is too large")
    return value


def _refuse_constant(name: str) -> None:
    """Refuse `NaN` and `Infinity`, which Python's decoder accepts and no other."""
    raise ValueError(f"{name} is not JSON")


def _on_one_line(text: str) -> str:
    """Return Python source with the newlines in its strings escaped."""
    if "\n" not in text:
        return text
    nesting, written = Nesting(), []
    for character in text:
        nesting.push(character)
        written.append("\\n" if character == "\n" and nesting.is_in_string else character)
    return "".join(written)


def as_json(text: str) -> str | None:
    """Return JSON unchanged, Python literals as JSON, and None for everything else."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = literal_value(text)
        return None if value is None and text != "None" else dumped(value)
    return text


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _evaluate(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    return ast.literal_eval(node)
