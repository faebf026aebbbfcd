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

    def push(self, text: str) -> tuple[str, str]:
        """Return the text that is not searched, and what follows it and is; undecided text is held back."""

    def flush(self) -> str:
        """Return the text held back, which is searched: the answer has ended."""


class _Section:
    """An answer that may begin with a section, or several in a row, with markers anywhere in its tokens."""

    def __init__(self, marks: ReasoningMarks) -> None:
        self._marks = marks
        self._is_inside = marks.is_open
        self._is_first = True  # whether no section has ended
        self._held: list[str] = []  # texts that may open a section
        self._is_blank = True  # whether they are nothing but blanks
        self._seen = ""  # inside: the end of the text so far, in which the end marker may have begun
        self._is_searched = False  # whether the last text, and so the next, is part of what is searched

    def push(self, text: str) -> tuple[str, str]:
        if self._is_searched:
            return "", text
        before: list[str] = []
        while text:
            if not self._is_inside:
                text = self._opening(before, text)
                if not self._is_inside:
                    return "".join(before), text
            size = self._size_inside(text)
            before.append(text[:size])
            text = text[size:]
        return "".join(before), ""

    def flush(self) -> str:
        held, self._held = "".join(self._held), []
        return held

    def _opening(self, before: list[str], text: str) -> str:
        """Return what a section or the content begins with, or nothing if that is not known yet."""
        self._held.append(text)
        self._is_blank = self._is_blank and not text.strip()
        if self._is_blank and self._is_first:  # joining them for each token would take 0.3 ms after 8,000
            return ""
        text = self.flush()
        if not self._is_first:  # clients are not shown the blanks after a section
            size = len(text) - len(text.lstrip("\n "))
            before.append(text[:size])
            text = text[size:]
        head = text.lstrip()
        self._is_inside = head.startswith(self._marks.start)
        if not self._is_inside and self._marks.start.startswith(head):
            self._held = [text]
            return ""
        self._is_searched = not self._is_inside
        return text

    def _size_inside(self, text: str) -> int:
        """Return how many characters belong to the section; note its end."""
        end, window = self._marks.end, self._seen + text
        at = window.find(end)
        if at < 0:
            self._seen = window[max(len(window) - len(end) + 1, 0) :]
            return len(text)
        size = at + len(end) - len(self._seen)
        self._is_inside = self._is_first = False
        self._is_blank, self._seen = True, ""
        return size


class _Messages:
    """An answer in harmony's format, in which each marker is a token."""

    def __init__(self, marks: HarmonyMarks) -> None:
        self._parser = HarmonyParser(is_reasoning_open=marks.is_open)
        self._num_read = 0
        self._is_searched = False  # whether the last text, and so the next, is part of what is searched

    def push(self, text: str) -> tuple[str, str]:
        was_searched, begun = self._is_searched, self._num_read
        self._num_read += len(text)
        pieces = self._parser.push(text)
        self._is_searched = self._parser.is_content
        if not self._is_searched:
            return text, ""
        size = 0  # of the text before the content, if this token begins it
        if not was_searched:
            starts = [piece.start - begun for piece in pieces if isinstance(piece, Content)]
            size = max(starts[0], 0) if starts else len(text)
        return text[:size], text[size:]

    def flush(self) -> str:
        return ""
