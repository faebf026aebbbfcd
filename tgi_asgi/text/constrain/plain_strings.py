r"""Strings of a JSON schema as plain text, without quotes: regexes of the grammar instead of JSON.

{"type": "string", "pattern": "^a|b", "maxLength": 4}
/(?:a(.|\n)*|(.|\n)*b(.|\n)*)/ and /(.|\n){0,4}/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from tgi_asgi.text.constrain.compiler_errors import checked
from tgi_asgi.text.constrain.formats import PLAIN_PATTERNS
from tgi_asgi.text.constrain.patterns import begins_a_class_with_its_end, lark_regex

ANY = r"(.|\n)*"
_UNENFORCED = "password"  # a format that says nothing about the text


def string_regexes(schema: Mapping[str, Any]) -> tuple[list[str], frozenset[str]]:
    """Return regexes that all match a text if it obeys a string's schema, and the keywords left out.

    The schema must be valid, with its own limits checked.
    """
    found: list[str] = []
    left_out = set()
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
    if least or most is not None:
        found.append(rf"/(.|\n){{{least},{'' if most is None else int(most)}}}/")
    if (pattern := schema.get("pattern")) is not None:
        whole = whole_pattern(pattern)
        found += [whole] if whole is not None else []
        left_out |= {"pattern"} if whole is None else set()
    form = schema.get("format")
    if form in PLAIN_PATTERNS:
        found.append(lark_regex(PLAIN_PATTERNS[form]))
    elif form is not None and form != _UNENFORCED:
        left_out.add("format")
    return found, frozenset(left_out)


def without(text: str) -> str:
    """Return a regex of texts that do not contain a text.

    If its first character comes again, only its end from there on counts: the regex excludes more.

        without("</a>")   /[^<]*(<([^<\\/][^<]*|\\/([^<a][^<]*|a([^<>][^<]*)?)?)?)*/

    The complement of texts with it would be shorter, but beside a bound on the length the compiler tries all
    of its states.
    """
    while text[0] in text[1:]:
        text = text[1:]
    first, rest = _in_class(text[0]), ""
    for character in reversed(text[1:]):
        other = f"[^{first}{_in_class(character)}][^{first}]*"
        rest = f"({other}|{escaped(character)}{rest})?" if rest else f"({other})?"
    return f"/[^{first}]*({escaped(text[0])}{rest})*/"


def _in_class(character: str) -> str:
    return f"\\{character}" if character in "\\/[]^-" else escaped(character)


def escaped(text: str) -> str:
    """Return a regex of one text, without the slashes around it."""
    special = "".join(f"\\{each}" if each in r"\/.+*?()|[]{}^$" else each for each in text)
    return special.replace("\n", r"\n")


@lru_cache(256)
def whole_pattern(pattern: str) -> str | None:
    """Return a regex of all texts in which a pattern is found; None if there is none.

    The grammar's regexes match whole texts and have no anchors, so only those at a pattern's ends can be
    expressed.
    """
    marks = list(_marks(pattern))
    bars = [at for at, mark, depth in marks if mark == "|" and depth == 0]
    begins, ends = {0, *(at + 1 for at in bars)}, {*bars, len(pattern)}
    anchors = {at: mark for at, mark, _ in marks if mark in "^$"}
    is_inside = any(at not in begins if mark == "^" else at + 1 not in ends for at, mark in anchors.items())
    if is_inside or begins_a_class_with_its_end(pattern):
        return None
    parts = []
    for begin, end in zip(sorted(begins), sorted(ends), strict=True):
        is_begun, is_ended = anchors.get(begin) == "^", end > begin and anchors.get(end - 1) == "$"
        inner = pattern[begin + is_begun : end - is_ended]
        parts.append(f"{'' if is_begun else ANY}(?:{inner}){'' if is_ended else ANY}")
    lark = lark_regex(f"(?:{'|'.join(parts)})")
    return lark if _is_valid(lark) else None


def _is_valid(lark: str) -> bool:
    is_refused, _ = checked({"grammars": [{"lark_grammar": f"start: TEXT\nTEXT: {lark}"}]})
    return not is_refused


def _marks(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Yield place, text and depth in groups of a pattern's bars and anchors, outside classes."""
    depth, is_class, is_escaped = 0, False, False
    for at, character in enumerate(pattern):
        if is_escaped or character == "\\":
            is_escaped = not is_escaped
        elif is_class:
            is_class = character != "]"
        elif character == "[":
            is_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character in "|^$":
            yield at, character, depth
