"""What a family's tool-call format has to say: how calls are written, as a grammar, and how they are read.

A format is one file with one `ToolFormat`; `__init__.py` lists them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
    """Reads calls as they are written, from behind the marker on."""

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells."""


class ToolFormat(Protocol):
    """One family's way to write calls.

    Attributes:
        name: what operators call it.
        marker: the text that opens the first call, or "" where a call begins the whole answer.
        markers: every text of the format that some tokenizers have a token of its own for.
        first: where `marker` is "": the character that tells a call from text, which must not begin with it.
    """

    name: str
    marker: str
    markers: tuple[str, ...]
    first: str

    def recognises(self, template: str) -> bool:
        """Tell from a chat template's source whether its model was trained on this format."""

    def begins(self, text: str) -> bool | None:
        """Tell, where `marker` is "", whether an answer that begins so is a call; None: not known yet."""

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        """Return grammar rules, of which `calls` is what follows the marker."""

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        """Return a reader of one answer's calls; the tools tell the types of what is not written as JSON."""


def alternatives(rule: str, expressions: Sequence[str]) -> str:
    """Return a rule of several expressions."""
    return f"{rule}: " + " | ".join(expressions)


def json_calls(tools: Sequence[ToolArguments], key: str = "arguments") -> str:
    """Return the rule `call`: `{"name": "f", "arguments": {...}}` of one of the tools."""
    heads = [literal(f'{{"name": "{tool.name}", "{key}": ') for tool in tools]
    return alternatives(
        "call", [f'{head} {tool.whole()} "}}"' for head, tool in zip(heads, tools, strict=True)]
    )


JSON_HEAD = re.compile(r'"name"\s*:\s*"([^"]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class JsonCallParser:
    """Reads calls whose arguments are JSON objects.

    Args:
        head: matches from anywhere before a call's name to where its arguments begin; group 1 is the name.
    """

    def __init__(self, head: re.Pattern[str] = JSON_HEAD) -> None:
        self._head = head
        self._buffer = ""
        self._object: _ObjectScanner | None = None

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells."""
        pieces: list[Piece] = []
        self._buffer += text
        while self._buffer:
            if self._object is None:
                found = self._head.search(self._buffer)
                if found is None:
                    break
                pieces.append(CallStart(found[1]))
                self._buffer = self._buffer[found.end() :]
                self._object = _ObjectScanner()
            size = self._object.scan(self._buffer)
            pieces.append(CallArguments(self._buffer[:size]))
            self._buffer = self._buffer[size:]
            if self._object.is_done:
                self._object = None
        return pieces


class _ObjectScanner:
    """Finds the end of a JSON object in a stream of text."""

    __slots__ = ("_depth", "_is_escaped", "_is_in_string", "is_done")

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self.is_done = False

    def scan(self, text: str) -> int:
        """Return how many characters of `text` belong to the object."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped = character == "\\"
                self._is_in_string = character != '"'
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_done = True
                    return index + 1
        return len(text)
