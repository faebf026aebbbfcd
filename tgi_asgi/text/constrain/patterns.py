r"""Regexes as clients write them, in the dialect of the grammar's compiler.

Clients write ECMA-262, which JSON Schema prescribes, or Python's dialect; the compiler reads Rust's:

    client    [^<>()[\]\\.]      [a-z&&[^b]]            [!--]      {"a": \d{2}}      a{,3}\Z
    means     one class          a class, then a `]`    ! to -     a plain brace     at most 3, to the end
    compiler  [^<>()\[\]\\.]     [a-z&\&\[^b]]          [!-\-]     \{"a": \d{2}}     a{0,3}\z
"""

from __future__ import annotations

import re

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.compiler_errors import refuse_panics

# An escaped character, the beginning of a count without a minimum, a brace that no count follows, or a class:
# its opening, members and end. A `]` that comes first is a member. `[:alpha:]` is kept: by the letter it
# lists six characters, but nobody means that. A class without an end is matched: looking for the end of each
# of 100,000 would take minutes.
_PIECES = re.compile(
    r"\\[pPux]\{[^}]{0,64}\}|\\.|\{,(?=\d*\})|\{(?!\d+(?:,\d*)?\})"
    r"|(\[\^?)(\]?(?:\[:\^?[a-z]+:\]|\\.?|[^\]\\])*)(\]|\Z)",
    re.DOTALL,
)
_BLANKS = r"\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}"
_IN_CLASS = re.compile(r"\\.|\[:\^?[a-z]+:\]|\[|^--|&&|--|~~", re.DOTALL)
_CONTROL = r"(?:[\x00-\x1f]|\\(?:x[01][\da-fA-F]|u00[01][\da-fA-F]|c))"
_CONTROLS = re.compile(_CONTROL)
_RANGE = re.compile(rf"{_CONTROL}-(?!{_CONTROL})(?=.)", re.DOTALL)


def lark_regex(pattern: str) -> str:
    r"""Return a pattern as a regex of a grammar, in which `\d`, `\w` and `\s` are ASCII.

    What is not `\s`, though, is not a blank of Unicode either: the client's regex would refuse it.

    Raises:
        InvalidRequest: if the compiler cannot read it, or would read another.
    """
    from llguidance import regex_to_lark

    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # which the function below would drop
        raise InvalidRequest("grammar is not valid: the regex ends with a lone `\\`")
    translated = _translated(pattern, rf"[^\s{_BLANKS}]", rf"\s{_BLANKS}")
    with refuse_panics():
        return f"/{regex_to_lark(translated, 'dws')}/"


def rust_regex(pattern: str) -> str:
    """Return a pattern with the same meaning in Rust's dialect, which nests and combines classes."""
    return _translated(pattern, r"\S", r"\s")


def _translated(pattern: str, no_blank: str, excluded_blank: str) -> str:
    """Replace what Rust reads differently, `\\S`, and the `\\s` of classes that exclude it."""
    outside = {"{": r"\{", "{,": "{0,", r"\Z": r"\z", r"\S": no_blank}

    def piece(found: re.Match[str]) -> str:
        opening, members, end = found.groups()
        if opening is None:
            return outside.get(found[0], found[0])
        blanks: dict[str, str] = {}
        if opening == "[^":
            blanks[r"\s"] = excluded_blank
        elif r"\s" not in members:  # `[\s\S]` is any character
            blanks[r"\S"] = no_blank
        return opening + _IN_CLASS.sub(lambda member: blanks.get(member[0]) or _member(member), members) + end

    return _PIECES.sub(piece, pattern)


def _member(found: re.Match[str]) -> str:
    text = found[0]
    if text == "[":
        return r"\["
    if text == "--" and found.start() == 0:
        return r"\--"  # a range that begins with a hyphen
    return f"{text[0]}\\{text[1]}" if text in ("&&", "--", "~~") else text


def begins_a_class_with_its_end(pattern: str) -> bool:
    """Return whether a class begins with `]`, which ends it in ECMA-262 and is a member in other dialects."""
    return any((found[2] or "").startswith("]") for found in _PIECES.finditer(pattern))


def has_control_literal(pattern: str) -> bool:
    """Return whether a pattern asks for a certain control character, which the compiler drops from JSON.

    It treats classes with more than one character correctly: one that excludes control characters, or has a
    range from one of them to another character.
    """
    return _CONTROLS.search(_PIECES.sub(_single_characters, pattern)) is not None


def _single_characters(found: re.Match[str]) -> str:
    """Return what may stand for one character only."""
    opening, members, _ = found.groups()
    return found[0] if opening is None else "" if opening == "[^" else _RANGE.sub("", members)
