"""Constraints as grammar text: JSON schemas, regexes, choices, EBNF, and their combinations.

Pure functions from client input to llguidance's Lark dialect, with limits that keep compilation short. Text
only; `grammar.py` compiles it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.gbnf import gbnf_to_lark, is_gbnf
from tgi_asgi.text.constrain.patterns import lark_regex
from tgi_asgi.text.constrain.schema import enforceable

MAX_CHARS = 128 * 1024  # of a grammar; compiling that much takes up to 0.1 s
MAX_DEPTH = 64  # of a schema; the compiler itself stops at 128
MAX_REFERENCES = 512  # the compiler recurses along chains of them; 5,000 overflow its stack
MAX_PROPERTIES = 1_000  # in a schema; compile time is quadratic in an object's properties: 9,000 take 7 s
MAX_CONJUNCTS = 8  # regexes that must match together; time and memory are exponential in their number

COMPACT: Mapping[str, Any] = {"whitespace_flexible": False}
SPACED: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Without \u0000: a property name escaped that way would pass for one that the schema does not list.
_ESCAPES: Mapping[str, Any] = {"json_allowed_escapes": 'nrbtf\\"'}


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar that has not been compiled.

    Attributes:
        lark: Rules in llguidance's dialect, beginning with `start`.
        parts: Further grammars, which the rules refer to as `@<name>`.
        ignored: Schema keywords that the grammar does not enforce, sorted.
        free: Marks; before each of them, in turn, an answer is any text.
        opening: Mark that must begin the answer for the first of these parts to be present.
        wakers: Marks that may come in each free part instead of its own.
    """

    lark: str
    parts: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    opening: str = ""
    wakers: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole grammar as the compiler reads it; equal grammars have equal text."""
        named = [{"name": name, "lark_grammar": lark} for name, lark in self.parts]
        return json.dumps({"grammars": [{"lark_grammar": self.lark}, *named]})


def json_schema(schema: Mapping[str, Any] | bool, *, is_strict: bool = True) -> GrammarSource:
    """Constrain to JSON of a schema, without whitespace between tokens, properties in the schema's order.

    Args:
        is_strict: Whether to refuse keywords that cannot be enforced, instead of listing them as ignored.

    Raises:
        InvalidRequest: if the schema is too large or too deep, cannot be matched, or cannot be enforced.
    """
    text, ignored = inline_json(schema, COMPACT, is_strict=is_strict)
    return GrammarSource("start: " + text, ignored=tuple(sorted(ignored)))


def after_a_space(source: GrammarSource) -> GrammarSource:
    """Return a grammar that also allows the space that a vocabulary writes before a text's first word."""
    return replace(source, lark=source.lark.replace("start:", 'start: " "? after_space\nafter_space:', 1))


KINDS = ("json", "regex", "choice", "grammar", "json_object")  # kinds of constraints, as clients name them


def source_of(kind: str, value: Any, *, is_strict: bool = False) -> GrammarSource:
    """Return the grammar for a client's value of one of `KINDS`.

    Raises:
        InvalidRequest: if the value has the wrong shape, or as the functions below.
    """
    match kind, value:
        case "json", _:
            return _schema_of(value, is_strict=is_strict)
        case "json_object", _:
            return any_object()
        case "choice", list():
            return choice(value)
        case "choice", _:
            raise InvalidRequest("a choice takes a list of strings")
        case _, str():
            return regex(value) if kind == "regex" else ebnf(value)
    raise InvalidRequest("a regex or a grammar must be a string")


def _schema_of(value: object, *, is_strict: bool) -> GrammarSource:
    """Read a schema as clients send it: an object, or text that holds one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the JSON schema is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("a JSON schema must be an object, or text that holds one")
    return json_schema(value, is_strict=is_strict)


def inline_json(
    schema: Mapping[str, Any] | bool, separators: Mapping[str, Any], *, is_strict: bool = True
) -> tuple[str, frozenset[str]]:
    """Return a schema as an expression inside a rule, and the keywords it ignores; raises as `json_schema`.

    A schema that lists properties but no type describes an object, as in TGI's guides; by the letter of JSON
    Schema it would allow numbers, too.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    check_schema(schema)
    if "properties" in schema and "type" not in schema:
        schema = {"type": "object", **schema}
    adapted, ignored = enforceable(schema, is_strict=is_strict)
    options = {**separators, **_ESCAPES, "lenient": not is_strict}
    return "%json " + json.dumps({**adapted, "x-guidance": options}), ignored


def any_object() -> GrammarSource:
    """Constrain to any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> GrammarSource:
    r"""Constrain to texts that a regex matches as a whole; `\d`, `\w` and `\s` are ASCII.

    Raises:
        InvalidRequest: if the pattern is too long.
    """
    _check_size(pattern)
    return GrammarSource(f"start: {lark_regex(pattern)}")


def choice(texts: Sequence[str]) -> GrammarSource:
    """Constrain to one of several texts.

    Raises:
        InvalidRequest: if there are none, or too many.
    """
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("a choice takes a list of at least one string")
    lark = "start: " + " | ".join(map(literal, texts))
    _check_size(lark)
    return GrammarSource(lark)


def ebnf(text: str) -> GrammarSource:
    """Constrain to a context-free grammar: Lark as llguidance reads it, or llama.cpp's GBNF.

    Raises:
        InvalidRequest: if it is too long, has too many rules, or is GBNF with a mistake.
    """
    _check_size(text)
    try:
        lark = gbnf_to_lark(text) if is_gbnf(text) else text
    except ValueError as error:
        raise InvalidRequest(f"grammar is not valid: {str(error)[:300]}") from None
    num_rules = sum(":" in line for line in lark.splitlines())
    if lark.count("&") > MAX_CONJUNCTS:
        raise InvalidRequest(f"a grammar has at most {MAX_CONJUNCTS} `&`")
    if num_rules > MAX_REFERENCES:
        raise InvalidRequest(f"a grammar has at most {MAX_REFERENCES} rules, got {num_rules}")
    return GrammarSource(lark)


def literal(text: str) -> str:
    """Return a text as a string literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Check the size of a schema, without recursion.

    Raises:
        InvalidRequest: if it is too large, too deep, or contains something that takes too long to compile.
    """
    num_references = num_properties = num_patterns = 0
    has_conjunction = False
    for depth, key, value in _walk(schema):
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"a JSON schema nests at most {MAX_DEPTH} levels deep")
        num_references += key == "$ref"
        num_patterns += key == "pattern"
        has_conjunction |= key == "allOf"
        if key in ("properties", "patternProperties") and isinstance(value, Mapping):
            num_properties += len(value)
    if has_conjunction and num_patterns > MAX_CONJUNCTS:
        raise InvalidRequest(f"a JSON schema with `allOf` has at most {MAX_CONJUNCTS} `pattern`s")
    if num_properties > MAX_PROPERTIES:
        raise InvalidRequest(f"a JSON schema has at most {MAX_PROPERTIES} properties, got {num_properties}")
    if num_references > MAX_REFERENCES:
        raise InvalidRequest(f"a JSON schema has at most {MAX_REFERENCES} `$ref`s, got {num_references}")
    _check_size(json.dumps(schema))


def _walk(schema: object) -> Iterator[tuple[int, str | None, object]]:
    """Yield (depth, key, value) for everything inside a JSON value."""
    waiting: list[tuple[int, object]] = [(0, schema)]
    while waiting:
        depth, value = waiting.pop()
        items: Iterable[tuple[str | None, object]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list):
            items = ((None, item) for item in value)
        for key, item in items:
            yield depth, key, item
            if isinstance(item, Mapping | list):
                waiting.append((depth + 1, item))


def _check_size(text: str) -> None:
    if len(text) > MAX_CHARS:
        raise InvalidRequest(f"a grammar has at most {MAX_CHARS} characters, got {len(text)}")
