"""Which numbers and texts of a schema the compiler handles exactly, and rewrites for the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeGuard

_NUDGE = Decimal("0.000001")
_MAX_MULTIPLE = 10_000
_MAX_DIGITS = 15  # of a fraction; the compiler rounds further digits
_FINEST = 1e-10  # the compiler accepts no finer step
_MAX_NUMBER = 9e15  # beyond it, doubles do not hold every integer
_MIN_WIDTH = 1e-8  # of a range; in a narrower one, the finest steps are too few
_MAX_INTEGER = 9 * 10**18  # the compiler counts in 64 bits
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
# Keywords that list or describe the values themselves.
_OF_VALUES = frozenset({"const", "enum", "$ref", "anyOf", "oneOf", "allOf"})
# Keywords that the compiler combines with a range; it then claims that a single value holds no multiple.
_COMBINED = _OF_VALUES | {"multipleOf"}
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")  # only writable as \u0000, which `inline_json` forbids


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a JSON number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_exact(value: object) -> bool:
    """Return whether the compiler can write a JSON value unchanged; it computes in doubles."""
    if isinstance(value, str):
        return _UNWRITABLE.search(value) is None
    if isinstance(value, Mapping):
        return all(map(is_exact, value)) and all(map(is_exact, value.values()))
    if isinstance(value, list):
        return all(map(is_exact, value))
    if not is_number(value):
        return True
    return abs(value) <= 2**53 and (
        value % 1 == 0 or len(Decimal(repr(value)).as_tuple().digits) <= _MAX_DIGITS
    )


def is_small_multiple(value: float) -> bool:
    """Return whether the automaton of `multipleOf`, which counts in units of the last digit, stays small."""
    if isinstance(value, int):
        return abs(value) <= _MAX_MULTIPLE
    digits = f"{value:.12g}".replace(".", "").replace("-", "").lstrip("0")
    return "e" not in digits and int(digits or "0") <= _MAX_MULTIPLE


def count(value: Any) -> Any:
    """Return a count of characters, items or properties as an integer; 2.0 is one, too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def nudge_bounds(schema: dict[str, Any]) -> None:
    """Correct the exclusive bounds of one schema that the compiler would include."""
    _nudge(schema, "Minimum", 1)
    _nudge(schema, "Maximum", -1)


def bound_integer(schema: dict[str, Any]) -> None:
    """Limit an integer to 19 digits: a small model that has begun one may not find its end."""
    types = _types(schema)
    if "integer" not in types or "number" in types or _OF_VALUES & schema.keys():
        return
    for names, limit in ((_LOWER, -_MAX_INTEGER), (_UPPER, _MAX_INTEGER)):
        if not schema.keys() & names:
            schema[names[0]] = limit


def bound_fraction(schema: dict[str, Any]) -> None:
    """Limit a number with a bound to ten digits after the decimal point, and 16 before, for the same reason.

    More digits could also round to a bound that the schema excludes. Numbers without any bound stay
    unrestricted, because some of them have an exponent, which the compiler does not allow beside a bound.
    """
    least, most = (
        next((value for name in names if is_number(value := schema.get(name))), None)
        for names in (_LOWER, _UPPER)
    )
    if "number" not in _types(schema) or (least is None and most is None) or _COMBINED & schema.keys():
        return
    lower, upper = (-_MAX_NUMBER if least is None else least), (_MAX_NUMBER if most is None else most)
    if upper - lower < _MIN_WIDTH or max(abs(lower), abs(upper)) > _MAX_NUMBER:
        return
    schema["multipleOf"] = _FINEST
    for names, limit in ((_LOWER, lower), (_UPPER, upper)):
        if not schema.keys() & names:  # the compiler refuses what is not a number there
            schema[names[0]] = limit


def _types(schema: Mapping[str, Any]) -> list[Any]:
    kinds = schema.get("type")
    return kinds if isinstance(kinds, list) else [kinds]


def _nudge(schema: dict[str, Any], bound: str, direction: int) -> None:
    """Move an integral exclusive bound slightly away from zero if the opposite bound is less than 1 away.

    llguidance 1.9 would allow the bound itself: 7 for a number above 7 and at most 7.5.
    """
    limit = schema.get(f"exclusive{bound}")
    facing = ("maximum", "exclusiveMaximum") if direction > 0 else ("minimum", "exclusiveMinimum")
    others = [value for name in facing if is_number(value := schema.get(name))]
    if not is_number(limit) or limit % 1 != 0 or direction * limit < 0:
        return
    if any(abs(other - limit) < 1 for other in others):
        nudged = float(Decimal(int(limit)) + direction * _NUDGE)
        schema[f"exclusive{bound}"] = nudged
