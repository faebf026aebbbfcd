r"""Convert GBNF, the grammars of llama.cpp (and XGrammar's EBNF, with the same syntax), to llguidance's Lark.

    gbnf_to_lark('root ::= "\\u00e9"\n  | [^\\x00-\\x1f]')

llguidance's converter does most of the work. This module first rewrites what the converter gets wrong:
numeric character escapes, character classes in which its regexes see set operations, alternatives that begin
a line, and a rule named `start`.
"""

from __future__ import annotations

import re

_RULE = re.compile(r"^[ \t]*[\w-]+\s*::=", re.MULTILINE)
# Both patterns match wherever they begin, so that no text is searched again from each of its characters: a
# literal without an end goes on to the end of the grammar, and lines match without `|`, too.
_PIECE = re.compile(
    r"(?P<comment>#[^\n]*)"
    r'|"(?P<text>(?:\\(?:.|\Z)|[^"\\])*)(?:"|(?P<open_text>\Z))'
    r"|\[(?P<chars>(?:\\(?:.|\Z)|[^\]\\])*)(?:\]|(?P<open_chars>\Z))",
    re.DOTALL,
)
_NEXT_LINES = re.compile(r"((?:\r?\n[ \t]*)+)(\|?)")
_START = re.compile(r"(?<![\w-])start(?![\w-])")  # the converter renames `root` to this
_CHAR = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|(.)", re.DOTALL)
_CONTROL = re.compile(r"([\x00-\x08\x0b\x0c\x0e-\x1f])")  # those without a single-letter escape
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
_IN_CLASSES = re.compile(r"[\x00-\x1f^&~-]")  # written by number inside classes


def is_gbnf(text: str) -> bool:
    """Return whether a grammar has a rule in GBNF's form (`::=`); Lark has a single colon."""
    return _RULE.search(text) is not None


def gbnf_to_lark(text: str) -> str:
    """Turn a grammar that begins with its rule `root` into one that begins with `start`.

    Raises:
        ValueError: if it is not GBNF; the message says where.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark as converted

    parts, end = list[str](), 0
    for piece in _PIECE.finditer(text):
        parts.append(_START.sub("start_", text[end : piece.start()]))
        if piece["open_text"] is not None or piece["open_chars"] is not None:
            line = text.count("\n", 0, piece.start()) + 1
            raise ValueError(f"Unexpected end of input at line {line}, in {piece[0][:20]!r}")
        if piece["text"] is not None:
            parts.append(_literal(piece["text"]))
        elif piece["chars"] is not None:
            parts.append(_class(piece["chars"]))
        end = piece.end()
    parts.append(_START.sub("start_", text[end:]))
    plain = _NEXT_LINES.sub(r"\2\1", "".join(parts))  # moves `|` to the end of the previous line
    try:
        return converted(plain)
    except Exception as error:  # the converter raises a bare Exception
        raise ValueError(str(error)) from None


def _literal(text: str) -> str:
    """Return a string with single-letter escapes only; other control characters become classes next to it."""
    chars = "".join(plain or _meant(escape) for escape, plain in _CHAR.findall(text))
    parts = [part for part in _CONTROL.split(chars) if part]
    spelled = [
        f"[{_in_class(part)}]" if _CONTROL.match(part) else f'"{part.translate(_ESCAPES)}"'
        for part in parts or [""]
    ]
    return spelled[0] if len(spelled) == 1 else f"({' '.join(spelled)})"


def _class(chars: str) -> str:
    """Return a character class in which only GBNF's `^` and `-` keep their special meaning."""
    negation = "^" if chars.startswith("^") else ""
    spelled = [
        plain if plain == "-" else _in_class(plain or _meant(escape))
        for escape, plain in _CHAR.findall(chars.removeprefix("^"))
    ]
    return f"[{negation}{''.join(spelled)}]"


def _in_class(char: str) -> str:
    return f"\\x{ord(char):02x}" if _IN_CLASSES.match(char) else f"\\{char}" if char in r"\[]" else char


def _meant(escape: str) -> str:
    """Return the character that an escape stands for, given without its backslash."""
    if len(escape) > 1:
        number = int(escape[1:], 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise ValueError(f"\\{escape} is not a character")
        return chr(number)
    if escape in _LETTERS:
        return _LETTERS[escape]
    if escape.isalnum():
        raise ValueError(f"the escape \\{escape} is not known")
    return escape
