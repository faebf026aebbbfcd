"""Values of formats that write texts without quotes: which texts a schema allows, and which other values.

    {"type": ["string", "null"], "minLength": 1}
    texts     {"type": "string", "minLength": 1}
    others    {"type": "null", "minLength": 1}

Models of these formats write each string as plain text, whatever its schema says besides. The grammar and the
parser must therefore agree on when a text is one, and when it is JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.literals import as_json, literal_value

# Keywords that restrict no value.
_ANNOTATIONS = frozenset({"description", "title", "default", "examples", "$comment", "deprecated"})
_OF_TEXTS = frozenset({"pattern", "minLength", "maxLength", "format"})
_BEYOND = frozenset({"not", "if", "$dynamicRef"})
_KINDS = ("object", "array", "number", "integer", "boolean", "null")
NULLS = ("null", "None")  # Qwen 3.5's template writes null as Python does
_MAX_PARTS = 64  # of a schema, with those that it refers to
# What values that are no texts may begin with, as JSON or in Python; a text in quotes might be JSON, too.
_NUMBER = "-+.(0123456789"
_BEGINNINGS = {"object": "{", "array": "[(", "number": _NUMBER, "integer": _NUMBER}


@dataclass(frozen=True, slots=True)
class Forms:
    """The values that a schema allows.

    Attributes:
        texts: Schemas of those that are strings.
        others: Schemas of the others.
    """

    texts: tuple[Mapping[str, Any], ...] = ()
    others: tuple[Any, ...] = ()

    @property
    def may_be_null(self) -> bool:
        """Whether the only value that is no text is null."""
        return bool(self.texts and self.others) and self._kinds() == {"null"}

    def not_first(self) -> str:
        """Return the characters, for a regex's class, that begin other values, and therefore no text."""
        kinds = self._kinds()
        if kinds <= {"null"}:
            return ""
        firsts = sorted({each for kind in kinds for each in _BEGINNINGS.get(kind, "")})
        return '"\\s' + "".join(f"\\{each}" if each in "[-" else each for each in firsts)

    def read(self, written: str) -> str:
        """Return the JSON of a value that a model has written."""
        if not self.others:
            return dumped(written)
        text = written.strip()
        found = as_json(text)
        if found is None:
            return dumped(written)
        if not self.texts:
            return found
        kind, kinds = _kind(literal_value(text)), self._kinds()
        is_quoted = kind == "string" and text.startswith('"') and not self.may_be_null
        is_other = kind in kinds or (kind == "integer" and "number" in kinds)
        return found if is_quoted or is_other else dumped(written)

    def read_json(self, written: str) -> str:
        """Return the JSON of a value that a model has marked as JSON."""
        if self.others:
            return Forms(others=self.others).read(written)
        found = as_json(written.strip())
        return dumped(written) if found is None or found[0] != '"' else found

    def _kinds(self) -> set[str]:
        return {kind for schema in self.others for kind in _kinds_of(schema)}


def forms_of(schema: Any, resolve: Callable[[str], Any]) -> Forms:
    """Divide the values that a schema allows; `resolve` finds the definition that `#/...` refers to."""
    try:
        return _Division(resolve).forms(schema)
    except _TooManyParts:
        return Forms(others=(schema,))


class _TooManyParts(Exception):
    """A schema has too many alternatives: references may be circular, and double at each level."""


class _Division:
    """The division of one schema."""

    def __init__(self, resolve: Callable[[str], Any]) -> None:
        self._resolve = resolve
        self._num_left = _MAX_PARTS

    def forms(self, schema: Any) -> Forms:
        self._num_left -= 1
        if self._num_left < 0:
            raise _TooManyParts
        if not isinstance(schema, Mapping):
            schema = {}
        rules = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        for key in ("anyOf", "oneOf", "allOf"):
            branches = rules.pop(key, None)
            if branches is None:
                continue
            if not _are_apart(branches, rules) or (key == "allOf" and len(branches) > 1):
                return Forms(others=(schema,))
            forms = [self.forms({**rules, **branch}) for branch in branches]
            texts = tuple(text for each in forms for text in each.texts)
            others = tuple(other for each in forms for other in each.others)
            return Forms(texts, others) if texts else Forms(others=(schema,))
        if isinstance(reference := rules.get("$ref"), str):
            found = self._resolve(reference)
            is_alone = rules.keys() == {"$ref"} and isinstance(found, Mapping)
            referred = self.forms(found) if is_alone else Forms()
            return referred if referred.texts else Forms(others=(schema,))
        for key in ("const", "enum"):
            if key in rules:
                return _of_values(rules, key, schema)
        return _of_kinds(rules, schema)


def _are_apart(branches: Any, rules: Mapping[str, Any]) -> bool:
    """Return whether the members of a combination say nothing that the keywords beside it say, too."""
    are_schemas = isinstance(branches, list) and all(isinstance(each, Mapping) for each in branches)
    return are_schemas and not any((rules.keys() & each.keys()) - {"type"} for each in branches)


def _of_values(rules: Mapping[str, Any], key: str, schema: Mapping[str, Any]) -> Forms:
    values = rules["enum"] if key == "enum" else [rules["const"]]
    kinds = _types(rules, ["string", *_KINDS])
    texts = [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
    if not texts or "string" not in kinds:
        return Forms(others=(schema,))
    rest = {name: value for name, value in rules.items() if name in _OF_TEXTS}
    others = [value for value in values if not isinstance(value, str)] if kinds != ["string"] else []
    return Forms(({**rest, "enum": texts},), ({"enum": others},) if others else ())


def _of_kinds(rules: Mapping[str, Any], schema: Mapping[str, Any]) -> Forms:
    kinds = _types(rules, ["object"] if "properties" in rules else ["string", *_KINDS])
    if "string" not in kinds:
        return Forms(others=(schema,))
    if not rules:
        return Forms(({"type": "string"},), ({},))  # half as large a grammar as that of all types but text
    rest = [kind for kind in kinds if kind != "string"]
    text = {name: value for name, value in rules.items() if name in _OF_TEXTS | _BEYOND}
    return Forms(({"type": "string", **text},), ({**rules, "type": rest},) if rest else ())


def _types(rules: Mapping[str, Any], otherwise: list[Any]) -> list[Any]:
    kinds = rules.get("type", otherwise)
    return kinds if isinstance(kinds, list) else [kinds]


def _kinds_of(schema: Any) -> list[str]:
    """Return the types of the values that are no texts."""
    if not isinstance(schema, Mapping):
        return list(_KINDS)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return [_kind(value) for value in values]
    kinds = _types(schema, ["object"] if "properties" in schema else list(_KINDS))
    return [kind for kind in kinds if isinstance(kind, str)]


def _kind(value: Any) -> str:
    """Return JSON Schema's name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    names: dict[type, str] = {str: "string", dict: "object"}
    return names.get(type(value), "array")
