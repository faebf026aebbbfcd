r"""GBNF, llama.cpp's grammars, and the EBNF of XGrammar, whose words are the same, as llguidance's Lark.

    gbnf_to_lark('root ::= "\\u00e9"\n  | [^\\x00-\\x1f]')

llguidance converts most of it. It spoils what is put right before: escapes of characters by number, classes
in which its regexes see set operations, alternatives that begin a line, and a rule that is called `start`.
"""

from __future__ import annotations

import re

_RULE = re.compile(r"^[ \t]*[\w-]+\s*::=", re.MULTILINE)
_PIECE = re.compile(
    r'(?P<comment>#[^\n]*)|"(?P<text>(?:\\.|[^"\\])*)"|\[(?P<chars>(?:\\.|[^\]\\])*)\]', re.DOTALL
)
_NEXT_LINE = re.compile(r"((?:\r?\n[ \t]*)+)\|")
_START = re.compile(r"(?<![\w-])start(?![\w-])")  # a name that `root` is given
_CHAR = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|(.)", re.DOTALL)
_CONTROL = re.compile(r"([\x00-\x08\x0b\x0c\x0e-\x1f])")  # those without an escape of one letter
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
_IN_CLASSES = re.compile(r"[\x00-\x1f^&~-]")  # what is written by number there


def is_gbnf(text: str) -> bool:
    """Tell whether a grammar has a rule as GBNF writes it; Lark has one colon."""
    return _RULE.search(text) is not None


def gbnf_to_lark(text: str) -> str:
    """Turn a grammar that begins with its rule `root` into one that begins with `start`.

    Raises:
        ValueError: it is not GBNF; the message says where.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark as converted

    plain, end = "", 0
    for piece in _PIECE.finditer(text):
        plain += _START.sub("start_", text[end : piece.start()])
        if piece["text"] is not None:
            plain += _literal(piece["text"])
        elif piece["chars"] is not None:
            plain += _class(piece["chars"])
        end = piece.end()
    plain += _START.sub("start_", text[end:])
    try:
        return converted(_NEXT_LINE.sub(r"|\1", plain))  # the line before goes on
    except Exception as error:  # the converter's own are nothing else
        raise ValueError(str(error)) from None


def _literal(text: str) -> str:
    """Return a string in whose escapes are letters alone; control characters stand beside it, as classes."""
    chars = "".join(plain or _meant(escape) for escape, plain in _CHAR.findall(text))
    parts = [part for part in _CONTROL.split(chars) if part]
    spelled = [
        f"[{_in_class(part)}]" if _CONTROL.match(part) else f'"{part.translate(_ESCAPES)}"'
        for part in parts or [""]
    ]
    return spelled[0] if len(spelled) == 1 else f"({' '.join(spelled)})"


def _class(chars: str) -> str:
    """Return a class of characters, in which nothing but `^` and `-` of GBNF's has a meaning."""
    negation = "^" if chars.startswith("^") else ""
    spelled = [
        plain if plain == "-" else _in_class(plain or _meant(escape))
        for escape, plain in _CHAR.findall(chars.removeprefix("^"))
    ]
    return f"[{negation}{''.join(spelled)}]"


def _in_class(char: str) -> str:
    return f"\\x{ord(char):02x}" if _IN_CLASSES.match(char) else f"\\{char}" if char in r"\[]" else char


def _meant(escape: str) -> str:
    """Return the character that is written as a backslash and this."""
    if len(escape) > 1:
        number = int(escape[1:], 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise ValueError(f"\\{escape} is no character")
        return chr(number)
    if escape in _LETTERS:
        return _LETTERS[escape]
    if escape.isalnum():
        raise ValueError(f"the escape \\{escape} is not known")
    return escape
