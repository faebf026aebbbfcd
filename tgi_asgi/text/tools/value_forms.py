"""Values of formats that write texts without quotes: which texts a schema allows, and which other values.

    {"type": ["string", "null"], "minLength": 1}
    texts     {"type": "string", "minLength": 1}
    others    {"type": "null", "minLength": 1}

Models of these formats write each string as plain text, whatever its schema says besides. The grammar and the
parser must therefore agree on when a text is one, and when it is JSON. What reads as a value of another type
that the schema allows is that value, and everything else is a text: `3` is a number, `3 apples` and `1.2.3`
are not. The grammar need then exclude nothing, unless the schema restricts more than types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgi_asgi.text.constrain.references import Resolve
from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.literals import as_json

# Keywords that restrict no value.
_ANNOTATIONS = frozenset({"description", "title", "default", "examples", "$comment", "deprecated"})
_OF_TEXTS = frozenset({"pattern", "minLength", "maxLength", "format"})
_BEYOND = frozenset({"not", "if", "$dynamicRef"})
_KINDS = ("object", "array", "number", "integer", "boolean", "null")
NULLS = ("null", "None")  # Qwen 3.5's template writes null as Python does
_MAX_PARTS = 64  # of a schema, with those that it refers to
_BLANKS = " \t\r\n"  # JSON's
# What values that are not texts begin with, and which of them may be written as in Python, too. Other Python
# literals are texts: +49 30 1234, 0x1F, 1_000, (none).
_NUMBER = "-0123456789"
_BEGINNINGS = {"object": "{", "array": "[", "number": _NUMBER, "integer": _NUMBER}
_PYTHON_BEGINNINGS = ("{", "[", "True", "False", "None")
# Keywords that restrict the values of one type only.
_OF_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_OF_ARRAYS = frozenset(
    {
        "items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains",
        "minContains", "maxContains", "unevaluatedItems",
    }
)  # fmt: skip
_OF_OBJECTS = frozenset(
    {
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
        "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies",
        "unevaluatedProperties",
    }
)  # fmt: skip
_OF_ONE_TYPE = _OF_TEXTS | _OF_NUMBERS | _OF_ARRAYS | _OF_OBJECTS
_RULES = {"object": _OF_OBJECTS, "array": _OF_ARRAYS, "number": _OF_NUMBERS, "integer": _OF_NUMBERS}


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
        """Whether the only value that is not a text is null."""
        return bool(self.texts and self.others) and self._kinds() == {"null"}

    @property
    def are_all_plain(self) -> bool:
        """Whether every text is allowed: it is a string, or reads as one of the other values."""
        return self._has_any_text() and not self.not_first()

    def not_first(self) -> str:
        """Return the characters, for a regex's class, that begin other values: no text begins with them.

        Blanks may precede them. Where any text is allowed, only types whose values are restricted count.
        """
        kinds = self._kinds()
        if kinds <= {"null"}:
            return ""
        if self._has_any_text():
            kinds = {kind for schema in self.others for kind in _restricted_kinds(schema)}
        firsts = sorted({each for kind in kinds for each in _BEGINNINGS.get(kind, "")})
        if not self._has_any_text():
            firsts.append('"')
        return "".join(f"\\{each}" if each in "[-" else each for each in firsts)

    def read(self, written: str) -> str:
        """Return the JSON of a value that a model has written."""
        if not self.others:
            return dumped(written)
        if not self.texts:
            found = as_json(written.strip())
            return dumped(written) if found is None else found
        text = written.strip(_BLANKS)
        found = as_json(text)
        if found is None or (found != text and not text.startswith(_PYTHON_BEGINNINGS)):
            return dumped(written)
        value = json.loads(found)
        is_quoted = isinstance(value, str) and not self.may_be_null
        is_other = any(_allows(schema, value) for schema in self.others)
        return found if is_quoted or is_other else dumped(written)

    def read_json(self, written: str) -> str:
        """Return the JSON of a value that a model has marked as JSON."""
        if self.others:
            return Forms(others=self.others).read(written)
        found = as_json(written.strip())
        return dumped(written) if found is None or found[0] != '"' else found

    def _has_any_text(self) -> bool:
        return any(schema.keys() <= {"type"} for schema in self.texts)

    def _kinds(self) -> set[str]:
        return {kind for schema in self.others for kind in _kinds_of(schema)}


def forms_of(schema: Any, resolve: Resolve) -> Forms:
    """Divide the values that a schema allows; `resolve` finds the definitions that it refers to."""
    try:
        return _Division(resolve).forms(schema)
    except _TooManyParts:
        return Forms(others=(schema,))


class _TooManyParts(Exception):
    """A schema has too many alternatives: references may be circular, and double at each level."""


class _Division:
    """The division of one schema."""

    def __init__(self, resolve: Resolve) -> None:
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
            is_alone = rules.keys() == {"$ref"} and found is not None
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
    """Return the types of the values that are not texts."""
    if not isinstance(schema, Mapping):
        return list(_KINDS)
    if (values := _listed(schema)) is not None:
        return [_kind(value) for value in values]
    kinds = _types(schema, ["object"] if "properties" in schema else list(_KINDS))
    return [kind for kind in kinds if isinstance(kind, str)]


def _restricted_kinds(schema: Any) -> set[str]:
    """Return the types whose values a schema restricts in any other way than by listing them."""
    if not isinstance(schema, Mapping) or _listed(schema) is not None:
        return set()
    rules = schema.keys() - _ANNOTATIONS - {"type"}
    if rules - _OF_ONE_TYPE:
        return set(_kinds_of(schema))
    return {kind for kind in _kinds_of(schema) if rules & _RULES.get(kind, frozenset())}


def _allows(schema: Any, value: Any) -> bool:
    """Return whether a schema lists a value, or allows its type."""
    kind, listed = _kind(value), _listed(schema)
    if listed is not None:
        return any(_kind(each) == kind and each == value for each in listed)
    kinds = _kinds_of(schema)
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _listed(schema: Any) -> list[Any] | None:
    """Return the only values that a schema allows, if it lists them."""
    if not isinstance(schema, Mapping):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


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
