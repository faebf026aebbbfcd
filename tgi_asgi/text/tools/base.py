"""What a family's tool-call format has to say: how calls are written, as a grammar, and how they are read.

A `ToolFormat` is one row of `formats.py`, of a class for all that are written alike.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer's text; `start` is its place in all that was read, markers included."""

    text: str
    start: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; pieces of its arguments follow, until the next one."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the current call's arguments, which together are a JSON object."""

    text: str


Piece = Content | Reasoning | CallStart | CallArguments


Mark = Callable[[str], str]  # a marker as an expression of a grammar: a special token, or its text


class CallParser(Protocol):
    """Reads calls as they are written, from behind the marker on.

    Models leave out ends, add blanks and fences, write several calls in one place, call what there is not,
    and go on with text: what is no call of a known tool is handed back.

    Attributes:
        rest: what follows the calls, once that is known; all that was read if the first is none.
    """

    rest: str | None

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells; not to be called once there is a `rest`."""

    def finish(self) -> str:
        """Return what was begun and is no call, at the end of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat(ABC):
    """One family's way to write calls.

    Attributes:
        name: what operators call it: vLLM's name where it has one.
        families: the models that write it, for the documents.
        shows: texts that a chat template of it has, all of a group.
        lacks: texts that none of its templates has, by which it is told from formats that share the others.
        marker: the text that opens the first call, or "" where a call begins the whole answer.
        openers: further texts that do, which some models write in its place; the parser reads them, too.
        markers: every text of the format that some tokenizers have a token of its own for.
        first: where `marker` is "": the character that tells a call from text, which must not begin with it;
            "" where any character may begin either.
    """

    name: str
    families: str
    shows: tuple[tuple[str, ...], ...]
    lacks: tuple[str, ...] = ()
    marker: str = ""
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    first: str = ""

    @property
    def may_begin(self) -> bool:
        """Whether an answer may begin with a call that has no marker: `begins` tells."""
        return not self.marker

    def recognises(self, template: str) -> bool:
        """Tell from a chat template's source whether its model was trained on this format."""
        is_shown = any(all(text in template for text in group) for group in self.shows)
        return is_shown and not any(text in template for text in self.lacks)

    def begins(self, text: str, names: Collection[str]) -> bool | None:
        """Tell whether an answer that begins so is a call without a marker; None: not known yet."""
        return False

    @abstractmethod
    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        """Return grammar rules, of which `calls` is what follows the marker."""

    @abstractmethod
    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        """Return a reader of one answer's calls; the tools tell the types of what is not written as JSON."""


def alternatives(rule: str, expressions: Sequence[str]) -> str:
    """Return a rule of several expressions."""
    return f"{rule}: " + " | ".join(expressions)


_BLANKS = {"%d": "/[0-9]+/", "%s": "/[a-zA-Z0-9]{9}/", "%_": '" "?', "%n": r'"\n"?'}


def spelled(text: str, mark: Mark, markers: Sequence[str]) -> str:
    """Return a text as an expression of a grammar, markers in it as `mark` writes them.

    `%d` stands for a number, `%s` for an id, `%_` and `%n` for a blank and a line's end that may be left out.
    """
    known = sorted(markers, key=len, reverse=True)
    expressions: list[str] = []
    plain = ""
    # A line's end is a lexeme of its own: the compiler's lexer, which never goes back, could not tell
    # "\n" before a further call from "\n</calls>" else.
    for part in re.split("|".join(["(%[ds_n]", r"\n", *map(re.escape, known)]) + ")", text):
        special = (
            literal(part) if part == "\n" else _BLANKS.get(part) or (mark(part) if part in known else "")
        )
        if not special or (special == literal(part) and part != "\n"):
            plain += part
            continue
        expressions += [*([literal(plain)] if plain else []), special]
        plain = ""
    return " ".join([*expressions, *([literal(plain)] if plain or not expressions else [])])


def num_held(text: str, marker: str) -> int:
    """Return how many characters at the end of a text may begin a marker."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)
