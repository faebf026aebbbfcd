"""Which part of an answer stop strings are searched in: its content and calls, not its reasoning.

Called by the engine's delivery for each token of a request that has stop strings, if its answer may contain
reasoning. A stop such as a blank line would otherwise end most answers inside their reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tgi_asgi.text.tools.base import Content
from tgi_asgi.text.tools.harmony import HarmonyParser


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """How reasoning is marked in an answer that may begin with a section of it.

    Attributes:
        start, end: Markers of the section.
        is_open: Whether the prompt has opened the section.
    """

    start: str
    end: str
    is_open: bool

    def scope(self) -> StopScope:
        """Return what splits one choice's text."""
        return _Section(self)


@dataclass(frozen=True, slots=True)
class HarmonyMarks:
    """The same for an answer in harmony's format, whose marks are always the same.

    Attributes:
        is_open: Whether the prompt has opened a message of reasoning.
    """

    is_open: bool

    def scope(self) -> StopScope:
        """Return what splits one choice's text."""
        return _Messages(self)


class StopScope(Protocol):
    """Splits a growing answer into text in which stop strings are searched, and text before it."""

    is_searched: bool  # whether the last text, and so the next, is part of what is searched

    def push(self, text: str) -> tuple[str, str]:
        """Return the text that is not searched, and what follows it and is; undecided text is held back."""

    def flush(self) -> str:
        """Return the text held back, which is searched: the answer has ended."""


class _Section:
    """An answer that may begin with one section, whose markers are anywhere in its tokens."""

    def __init__(self, marks: ReasoningMarks) -> None:
        self._marks = marks
        self._may_open = not marks.is_open
        self._is_inside = marks.is_open
        self._held: list[str] = []  # texts that may open the section
        self._is_blank = True  # whether they are nothing but blanks
        self._seen = ""  # inside: the end of the text so far, in which the end marker may have begun
        self.is_searched = False

    def push(self, text: str) -> tuple[str, str]:
        if self.is_searched:
            return "", text
        if self._may_open:
            self._held.append(text)
            self._is_blank = self._is_blank and not text.strip()
            if self._is_blank:  # joining them for each token would take 0.3 ms after 8,000 tokens
                return "", ""
            text = self.flush()
            head = text.lstrip()
            if not head.startswith(self._marks.start):
                self.is_searched = not self._marks.start.startswith(head)
                self._held = [] if self.is_searched else [text]
                return "", text if self.is_searched else ""
            self._may_open, self._is_inside = False, True
        size = self._size_inside(text) if self._is_inside else 0
        if not self._is_inside:  # clients are not shown the blanks between the section and the content
            size = len(text) - len(text[size:].lstrip("\n "))
            self.is_searched = size < len(text)
        return text[:size], text[size:]

    def flush(self) -> str:
        held, self._held = "".join(self._held), []
        return held

    def _size_inside(self, text: str) -> int:
        """Return how many characters belong to the section; note its end."""
        end, window = self._marks.end, self._seen + text
        at = window.find(end)
        if at < 0:
            self._seen = window[max(len(window) - len(end) + 1, 0) :]
            return len(text)
        self._is_inside = False
        return at + len(end) - len(self._seen)


class _Messages:
    """An answer in harmony's format, in which each marker is a token."""

    def __init__(self, marks: HarmonyMarks) -> None:
        self._parser = HarmonyParser(is_reasoning_open=marks.is_open)
        self._num_read = 0
        self.is_searched = False

    def push(self, text: str) -> tuple[str, str]:
        was_searched, begun = self.is_searched, self._num_read
        self._num_read += len(text)
        pieces = self._parser.push(text)
        self.is_searched = self._parser.is_content
        if not self.is_searched:
            return text, ""
        size = 0  # of the text before the content, if this token begins it
        if not was_searched:
            starts = [piece.start - begun for piece in pieces if isinstance(piece, Content)]
            size = max(starts[0], 0) if starts else len(text)
        return text[:size], text[size:]

    def flush(self) -> str:
        return ""
