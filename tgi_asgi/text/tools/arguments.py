"""The arguments of a tool: its schema, and grammar expressions of it for the tool-call formats."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.plain_strings import string_regexes
from tgi_asgi.text.constrain.references import Resolve, resolver
from tgi_asgi.text.constrain.source import SPACED, check_schema, inline_json, literal
from tgi_asgi.text.tools.parameters import Parameters, parameters_of, resolved
from tgi_asgi.text.tools.value_forms import Forms

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Many clients describe a tool without arguments by empty `properties`, with at most these other keywords.
_WITHOUT_RULES = frozenset(
    {"type", "properties", "required", "$defs", "definitions", "$schema", "$id", "title", "description"}
)

# Keywords that restrict a text or a boolean beyond its type.
_CONDITIONS = frozenset(
    {
        "enum", "const", "pattern", "minLength", "maxLength", "format", "$ref", "$dynamicRef", "anyOf",
        "oneOf", "allOf", "not", "if",
    }
)  # fmt: skip
MAX_REPEATED = 512 * 1024  # characters of one tool's definitions, each time that an argument uses them


@dataclass(frozen=True)
class ToolSpec:
    """A function that may be called.

    Attributes:
        is_strict: Whether a keyword of its parameters that cannot be enforced refuses the request; otherwise
            the keyword is ignored.
        is_free: Whether its arguments may be anything, whatever its parameters say.
    """

    name: str
    parameters: Mapping[str, Any] | None
    is_strict: bool = True
    is_free: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of its arguments, which are always an object."""
        if self.is_free:
            return {"type": "object"}
        if not self.parameters:
            return _NO_ARGUMENTS
        schema = {**resolved(self.parameters, resolver(self.parameters)), "type": "object"}
        has_no_rules = not (schema.get("required") or schema.keys() - _WITHOUT_RULES)
        if schema.get("properties") == {} and has_no_rules:
            schema["additionalProperties"] = False
        return schema

    @cached_property
    def arguments(self) -> Parameters:
        """What its schema says about each argument alone; read when the grammar is made, before any call."""
        return parameters_of(self.schema)

    @cached_property
    def resolve(self) -> Resolve:
        """Finds the part of its schema that a reference names."""
        return resolver(self.schema)


def freed(specs: Sequence[ToolSpec]) -> list[ToolSpec]:
    """Return the tools; those that are not strict may then have any arguments."""
    return [replace(spec, is_free=not spec.is_strict) for spec in specs]


class ToolArguments:
    """One tool's arguments as grammar expressions, with JSON spaced as models have learned to write it.

    A strict tool is refused if its schema is too large or invalid. The arguments of any other such tool are
    unconstrained, and `ignored` names it, because an agent's twenty other tools remain usable.

    Attributes:
        name: Name of the tool.
        ignored: Keywords that its expressions do not enforce; `tools.<name>` if they enforce none.
    """

    def __init__(self, spec: ToolSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._everything = f"tools.{spec.name}"
        self.ignored: set[str] = {self._everything} if spec.is_free else set()
        self._num_repeated = 0

    def whole(self) -> str:
        """Return all arguments as one JSON object."""
        return self._expression(self._spec.schema, otherwise={"type": "object"})

    def each(self) -> Iterator[tuple[str, Any, bool]]:
        """Yield each listed argument's name, schema and whether it is required.

        Raises:
            InvalidRequest: if the tool is strict, and its schema requires more than a format that writes each
                argument alone can enforce.
        """
        arguments, is_free = self._spec.arguments, self._is_free
        beyond = sorted(arguments.beyond)
        if self._spec.is_strict and beyond:
            raise InvalidRequest(
                f"`{beyond[0]}` cannot be enforced for the arguments of `{self.name}` as a whole"
            )
        self.ignored.update(beyond)
        for name in arguments.properties if is_free else arguments.names:
            value = {} if is_free else arguments.properties.get(name, {})
            yield name, value, name in arguments.required and not is_free

    def others(self) -> Any:
        """Return the schema of arguments that are not listed, which may come after those; None: none may."""
        others = self._spec.arguments.others
        return {} if others is not None and self._is_free else others

    @cached_property
    def _is_free(self) -> bool:
        """Whether the schema is too large or has no meaning, so that the arguments may be anything."""
        with self._freeing():
            check_schema(self._spec.schema)
            return False
        return True

    def value(self, schema: Any) -> str:
        """Return one argument's value: JSON, with booleans also as Python writes them."""
        if (
            isinstance(schema, Mapping)
            and schema.get("type") == "boolean"
            and not _CONDITIONS & schema.keys()
        ):
            return '("true" | "false" | "True" | "False")'
        described: Mapping[str, Any] = {}
        if isinstance(schema, Mapping):
            with self._freeing():
                described = {**schema, **self._shared_by(schema)}
        return self._expression(described, otherwise={})

    def others_of(self, forms: Forms) -> str:
        """Return the expression of those of an argument's values that are not texts."""
        if forms.may_be_null:
            return literal("null")
        return self.value(forms.others[0] if len(forms.others) == 1 else {"anyOf": list(forms.others)})

    def text_rules(self, schema: Mapping[str, Any]) -> list[str]:
        """Return regexes that a string matches as plain text, all of them, if it obeys its schema.

        Raises:
            InvalidRequest: if the tool is strict, and a keyword cannot be enforced.
        """
        with self._freeing():
            _, ignored = inline_json(schema, SPACED, is_strict=self._spec.is_strict)
            self.ignored |= ignored
            kept = {key: value for key, value in schema.items() if key not in ignored}
            rules, left_out = string_regexes(kept)
            self.leave_out(left_out)
            return rules
        return []

    def _shared_by(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return the definitions of the tool that a part of its schema may refer to.

        Each argument has a grammar of its own, which repeats them.

        Raises:
            InvalidRequest: if they have been repeated too often.
        """
        text = json.dumps(schema)
        if "$ref" not in text and "$dynamicRef" not in text:
            return {}
        whole = self._spec.schema
        shared = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        self._num_repeated += len(json.dumps(shared))
        if self._num_repeated > MAX_REPEATED:
            raise InvalidRequest(f"the definitions of `{self.name}` are too large to be used so often")
        return shared

    @property
    def resolve(self) -> Resolve:
        """Finds the part of the tool's schema that a reference names."""
        return self._spec.resolve

    def leave_out(self, keywords: Collection[str]) -> None:
        """Record keywords that a format cannot enforce.

        Raises:
            InvalidRequest: if the tool is strict.
        """
        if self._spec.is_strict and keywords:
            raise InvalidRequest(
                f"`{min(keywords)}` cannot be enforced for `{self.name}` as this model writes arguments"
            )
        self.ignored.update(keywords)

    def _expression(self, schema: Mapping[str, Any], *, otherwise: Mapping[str, Any]) -> str:
        with self._freeing():
            expression, ignored = inline_json(schema, SPACED, is_strict=self._spec.is_strict)
            self.ignored |= ignored
            return expression
        return inline_json(otherwise, SPACED)[0]

    @contextmanager
    def _freeing(self) -> Iterator[None]:
        """Note that nothing is enforced if the block refuses the schema; of a strict tool, let it."""
        try:
            yield
        except InvalidRequest:
            if self._spec.is_strict:
                raise
            self.ignored.add(self._everything)
