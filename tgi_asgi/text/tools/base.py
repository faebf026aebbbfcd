"""What a family's tool-call format has to say: how calls are written, as a grammar, and how they are read.

A format is one file with one `ToolFormat`; `__init__.py` lists them all.
"""

from __future__ import annotations

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


class ToolFormat(Protocol):
    """One family's way to write calls.

    Attributes:
        name: what operators call it.
        marker: the text that opens the first call, or "" where a call begins the whole answer.
        openers: further texts that do, which some models write in its place; the parser reads them, too.
        markers: every text of the format that some tokenizers have a token of its own for.
        first: where `marker` is "": the character that tells a call from text, which must not begin with it.
    """

    name: str
    marker: str
    openers: tuple[str, ...]
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


def num_held(text: str, marker: str) -> int:
    """Return how many characters at the end of a text may begin a marker."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)
