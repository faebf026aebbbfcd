"""Adapt a JSON schema to what llguidance can enforce, and find the keywords that it cannot.

    schema, ignored = enforceable(schema, is_strict=False)

Keywords that llguidance reads differently from JSON Schema 2020-12 are rewritten, so that everything the
result allows is also allowed by the keywords left in it. Recurses as deep as the schema: check its depth
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.all_of import BY_NAME, DATA, incomplete_objects, merge_all_of
from tgi_asgi.text.constrain.compiler_errors import problem_of, warnings_of
from tgi_asgi.text.constrain.disjoint import are_disjoint
from tgi_asgi.text.constrain.exact import (
    bound_fraction,
    bound_integer,
    count,
    is_exact,
    is_number,
    is_small_multiple,
    nudge_bounds,
)
from tgi_asgi.text.constrain.formats import PATTERNS
from tgi_asgi.text.constrain.patterns import has_control_literal, rust_regex
from tgi_asgi.text.constrain.references import Resolve, resolver

_FORMATS = frozenset({"ipv4", "ipv6", "uuid"})  # besides PATTERNS
_UNENFORCEABLE = frozenset(
    {
        "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "dependencies",
        "dependentRequired", "dependentSchemas", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
        "$dynamicRef", "$recursiveRef",
    }
)  # fmt: skip
_MAX_PATTERNS = 16  # per object; the compiler compares all pairs, hundreds take minutes
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_VALUES = ("const", "enum", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_OTHERS = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"}
)
_IN_WARNINGS = {"oneOf": ("oneOf",), "min/maxProperties": ("minProperties", "maxProperties")}


def enforceable(schema: Mapping[str, Any], *, is_strict: bool) -> tuple[dict[str, Any], frozenset[str]]:
    """Return a schema that the compiler understands, and the names of the keywords left out of it.

    Objects that list their properties and say nothing about others get no others. The schema would allow any,
    but a model that begins to invent properties does not stop. The result may share parts with the given
    schema.

    Args:
        is_strict: Whether to refuse a schema if one of its keywords cannot be enforced.

    Raises:
        InvalidRequest: if it is strict and not all of it can be enforced, or if no answer can match it.
    """
    document = merge_all_of(schema)
    adapter = _Adapter(document, is_strict=is_strict)
    result: dict[str, Any] = adapter.adapt(document)
    if is_strict:
        if adapter.left_out:
            raise InvalidRequest(f"cannot be enforced: {', '.join(adapter.left_out.values())[:300]}")
        return result, frozenset()
    ignored = set(adapter.left_out)
    for warning in warnings_of(result):  # about what only the compiler can see
        for start, names in _IN_WARNINGS.items():
            ignored.update(names if warning.startswith(start) else ())
    return result, frozenset(ignored & adapter.keywords)


class _Adapter:
    """A converter for the schemas of one document.

    Attributes:
        left_out: The parts left out, by keyword, each described for the client.
        keywords: All keywords encountered.
    """

    def __init__(self, document: Mapping[str, Any], *, is_strict: bool) -> None:
        self.left_out: dict[str, str] = {}
        self.keywords: set[str] = set()
        self._incomplete = incomplete_objects(document)
        self._resolve = resolver(document)
        self._is_strict = is_strict

    def adapt(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self.adapt(item) for item in schema]
        if not isinstance(schema, Mapping):
            return schema
        self.keywords |= schema.keys()
        result: dict[str, Any] = {}
        for key, value in schema.items():
            if key in BY_NAME and isinstance(value, Mapping):
                result[key] = {name: self.adapt(item) for name, item in value.items()}
            else:
                result[key] = value if key in DATA else self.adapt(value)
        self._leave_out(result)
        _put_right(result, self._resolve)
        bound_integer(result)
        if self._incomplete is not None and id(schema) not in self._incomplete:
            bound_fraction(result)
            if _is_listed(result):
                result["additionalProperties"] = False
        self._bound_below(result)
        return result

    def _leave_out(self, schema: dict[str, Any]) -> None:
        """Remove from one schema what cannot be enforced."""
        if schema.get("uniqueItems") is False:
            del schema["uniqueItems"]
        if schema.get("propertyNames") in (True, {}, {"type": "string"}):  # as every name is
            del schema["propertyNames"]
        for name in sorted(_UNENFORCEABLE & schema.keys()):
            self._drop(schema, name)
        for name in _VALUES:
            if name in schema and not is_exact(schema[name]):
                self._drop(schema, name, "of what cannot be written exactly")
        if is_number(step := schema.get("multipleOf")) and not is_small_multiple(step):
            self._drop(schema, "multipleOf", f"{step}: at most 4 significant digits are")
        self._leave_out_format(schema)
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#") and not self._is_strict:
            self._drop(schema, "$ref", reference)  # it may refer to an `$id`, which the compiler knows
        self._leave_out_patterns(schema)

    def _leave_out_format(self, schema: dict[str, Any]) -> None:
        form, kinds = schema.get("format"), schema.get("type")
        is_string = kinds == "string" or not isinstance(kinds, str | list) or "string" in kinds
        if not is_string or form == "password":
            schema.pop("format", None)  # says nothing of the value: OpenAPI's int32, or how to show it
        elif isinstance(form, str) and form not in _FORMATS and form not in PATTERNS:
            self._drop(schema, "format", form)

    def _leave_out_patterns(self, schema: dict[str, Any]) -> None:
        """Write patterns as the compiler reads them; remove those that it refuses."""
        pattern, names = schema.get("pattern"), schema.get("patternProperties")
        if isinstance(pattern, str):
            schema["pattern"] = rust_regex(pattern)
            problem = problem_of({"type": "string", "pattern": schema["pattern"]}) or (
                "control characters cannot be written" if has_control_literal(pattern) else None
            )
            if problem:
                self._drop(schema, "pattern", f"{pattern}: {problem}")
        if isinstance(names, Mapping):
            names = schema["patternProperties"] = {rust_regex(name): item for name, item in names.items()}
            problem = (
                problem_of({"patternProperties": dict.fromkeys(names, True)})
                if len(names) <= _MAX_PATTERNS
                else f"of more than {_MAX_PATTERNS} patterns"
            )
            if problem:
                self._drop(schema, "patternProperties", problem)
            if problem and "additionalProperties" in schema:  # all names that no dropped pattern covers
                self._drop(schema, "additionalProperties")

    def _bound_below(self, schema: dict[str, Any]) -> None:
        """Lower `minProperties` to what the compiler can count.

        It can count one more than the required properties, because an open object may have two with the same
        name. In an open object that lists optional properties, the compiler would demand an unlisted one.
        """
        least, required, known = (schema.get(name) for name in ("minProperties", "required", "properties"))
        if not isinstance(least, int):
            return
        needed = set(map(str, required)) if isinstance(required, list) else set()
        listed = set(known) if isinstance(known, Mapping) else set()
        is_closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
        if least <= len(needed):
            del schema["minProperties"]
        elif not is_closed and listed - needed:
            self._drop(schema, "minProperties", "beside optional properties and others")
        elif least > len(needed) + 1 and not is_closed:
            self._drop(schema, "minProperties", f"{least} of an object whose properties are not all listed")
            schema["minProperties"] = len(needed) + 1
        elif len(needed) + 1 < least <= len(listed | needed):
            self._drop(schema, "minProperties", f"{least} of optional properties")

    def _drop(self, schema: dict[str, Any], name: str, why: str = "") -> None:
        del schema[name]
        self.left_out.setdefault(name, f"`{name}` {why}".rstrip()[:200])


def _put_right(schema: dict[str, Any], resolve: Resolve) -> None:
    """Rewrite the keywords of one schema into the forms that the compiler understands."""
    schema.pop("$schema", None)  # keywords newer than the draft apply, too
    schema.pop("$recursiveAnchor", None)
    if "$dynamicAnchor" in schema:  # a plain anchor without `$dynamicRef`
        schema.setdefault("$anchor", schema.pop("$dynamicAnchor"))
    if not isinstance(schema.get("items"), list):
        schema.pop("additionalItems", None)  # it would hide `prefixItems`
    for name in _COUNTS:
        if name in schema:
            schema[name] = count(schema[name])
    pattern = PATTERNS.get(form) if isinstance(form := schema.get("format"), str) else None
    if pattern is not None:
        del schema["format"]
        own, others = {"pattern": f"^(?:{pattern})$"}, schema.get("allOf", [])
        schema |= {"allOf": [*others, own]} if "pattern" in schema else own
    nudge_bounds(schema)
    branches = schema.get("oneOf")
    if "anyOf" not in schema and isinstance(branches, list) and are_disjoint(branches, resolve):
        schema["anyOf"] = schema.pop("oneOf")


def _is_listed(schema: Mapping[str, Any]) -> bool:
    """Return whether a schema lists all properties that it needs, and says nothing about others."""
    properties, required = schema.get("properties"), schema.get("required", [])
    least = schema.get("minProperties", 0)
    return (
        isinstance(properties, Mapping)
        and bool(properties)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
        and isinstance(least, int)
        and least <= len(properties)
        and not _OF_OTHERS & schema.keys()
    )
