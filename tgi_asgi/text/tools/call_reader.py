"""What the parsers of calls share: how they look for calls, and what they do with text that is none.

A format's parser derives from `CallReader` and says where a call begins; a second class reads its arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from tgi_asgi.text.tools.base import CallArguments, CallStart, Piece


class ArgumentsReader(Protocol):
    """The arguments of one call, turned into a JSON object while they are written.

    Attributes:
        have_ended: Whether the call's last character has been read.
    """

    have_ended: bool

    def push(self, text: str) -> tuple[str, str]:
        """Return the JSON that is certain now, and what follows the call."""


class CallReader(ABC):
    """A `CallParser` that skips blanks, markers and fences before a call, and shows them if none follows.

        skipped            held     next text
        "\\n<tool_call>"    "call:"  "f{"     if `f` is a tool: a call begins, and both are dropped
        "\\n<tool_call>"    "call:"  "?"      no call: the rest is "\\n<tool_call>call:?"

    Everything except arguments is read one character at a time, so that the output does not depend on how
    the text was cut.
    """

    def __init__(self) -> None:
        self.rest: str | None = None
        self._skipped = ""
        self._held = ""  # may be the beginning of a call, or of something to skip
        self._has_called = False
        self._arguments: ArgumentsReader | None = None  # of the call that is being read

    @abstractmethod
    def _read_head(self, pieces: list[Piece]) -> str:
        """Look for the next call, as `_held` has one more character; return text that is to be read again.

        Implementations end with one of the methods below, or return "" if they need more text.
        """

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text."""
        pieces: list[Piece] = []
        at = 0
        while at < len(text) and self.rest is None:
            if self._arguments is not None:
                written, text = self._arguments.push(text[at:])
                at = 0
                if written:
                    pieces.append(CallArguments(written))
                if self._arguments.have_ended:
                    self._arguments = None
            else:
                self._held += text[at]
                at += 1
                if again := self._read_head(pieces):
                    text, at = again + text[at:], 0
        if self.rest is not None:
            self.rest += text[at:]
        return pieces

    def finish(self) -> str:
        """Return the text that resembled a call but is none; nothing of a call that has begun."""
        return self._skipped + self._held if self._skipped.strip() or not self._has_called else ""

    def _skip(self, size: int, *, may_be_text: bool = True) -> str:
        """Skip the beginning of the held text, and return the remainder; what may not be text is dropped."""
        if may_be_text:
            self._skipped += self._held[:size]
        again, self._held = self._held[size:], ""
        return again

    def _begin_call(self, name: str, arguments: ArgumentsReader | None, pieces: list[Piece]) -> None:
        """Begin a call; `arguments` is None if all of them have been read."""
        pieces.append(CallStart(name))
        self._skipped = self._held = ""
        self._arguments, self._has_called = arguments, True

    def _give_up(self) -> None:
        """End reading: no further call follows."""
        self.rest = self._skipped + self._held
        self._skipped = self._held = ""
