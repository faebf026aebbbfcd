"""Split one choice's text while it is generated: reasoning, content, tool calls.

Created by `api` for each choice that may have more than content; knows no wire format.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import CallParser, Content, Piece, Reasoning, ToolFormat, num_held
from tgi_asgi.text.tools.reasoning import ReasoningStyle, Wrapper


class _Part(enum.Enum):
    """What an answer's next character belongs to; the parts come in this order, the last two in turns."""

    START = enum.auto()  # a reasoning section may begin here
    REASONING = enum.auto()
    WRAPPER = enum.auto()  # the markers around the text may begin here
    TEXT = enum.auto()
    CALLS = enum.auto()


class AnswerParser:
    """An incremental parser of an answer. Markers are never shown, nor is text that may turn out to be one.

        parser = AnswerParser(style, format, is_reasoning_open=False)
        for text in texts: pieces = parser.push(text)
        pieces = parser.finish()

    Args:
        style: Markers of the reasoning section, or None if the answer has none.
        tools: Format of the calls, or None if there are none.
        specs: Tools that may be called.
        is_reasoning_open: Whether the prompt has opened the reasoning section.
        must_call: Whether the grammar allows only calls after the reasoning.
        wrapper: Markers that the model may write around the text of its answer.
    """

    def __init__(
        self,
        style: ReasoningStyle | None,
        tools: ToolFormat | None,
        specs: Sequence[ToolSpec] = (),
        *,
        is_reasoning_open: bool = False,
        must_call: bool = False,
        wrapper: Wrapper | None = None,
    ) -> None:
        self._style = style
        self._names = {spec.name for spec in specs}
        self._must_call = must_call
        self._tools = tools
        self._specs = specs
        self._calls: CallParser | None = None
        self._held = ""
        self._is_blank = False  # whether some text is held, and all of it is blanks
        self._blanks: list[str] = []  # blanks that follow it
        self._num_known = 0  # leading characters of `_held` in which no marker is searched
        self._opening = ""  # the marker that led to the calls, with the blanks before it
        self._has_called = False  # since that marker
        self._num_read = 0  # characters so far
        self._has_begun = False  # with text, or with a call that only an answer's beginning may be
        self._has_text = False  # whether some has been emitted
        self._label = style.label if style is not None else ""  # while it may follow
        self._end = wrapper.end if wrapper is not None and not wrapper.start else ""  # once it has begun
        self._wrapper = wrapper
        self._skips_blanks = False  # after the end of another part
        self._gap = ""  # the last blank there
        self._part = _Part.START
        if is_reasoning_open:
            self._part = _Part.REASONING
        elif style is None:
            self._begin_text()

    @property
    def is_reasoning(self) -> bool:
        """Whether the text is inside the reasoning section."""
        return self._part is _Part.REASONING

    def _begin_text(self) -> None:
        may_be_wrapped = self._wrapper is not None and self._wrapper.start
        self._part = _Part.WRAPPER if may_be_wrapped else _Part.TEXT

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text."""
        self._num_read += len(text)
        if self._is_blank and text.isspace():  # held back, too: to read all of it again may take 0.3 ms
            self._blanks.append(text)
            return []
        self._take_blanks()
        self._held += text
        pieces = self._read(is_end=False)
        self._is_blank = self._held.isspace()
        return pieces

    def finish(self) -> list[Piece]:
        """Return the pieces that were held back, at the end of the answer."""
        self._take_blanks()
        pieces = self._read(is_end=True) if self._calls is None else []
        if self._calls is not None:
            self._leave_calls(self._calls.finish())
            if not self._must_call:
                self._emit_text(pieces, 0, is_end=True)
        return pieces

    def _take_blanks(self) -> None:
        if self._blanks:
            self._held = "".join((self._held, *self._blanks))
            self._blanks.clear()

    def _read(self, *, is_end: bool) -> list[Piece]:
        """Read part after part, until one needs more text."""
        pieces: list[Piece] = []
        is_ended = True
        while is_ended:
            match self._part:
                case _Part.START:
                    is_ended = self._begin_reasoning(is_end)
                case _Part.REASONING:
                    is_ended = self._take_reasoning(pieces, is_end)
                case _Part.WRAPPER:
                    is_ended = self._unwrap(is_end)
                case _Part.TEXT:
                    is_ended = self._take_content(pieces, is_end)
                case _Part.CALLS:
                    is_ended = self._read_calls(pieces)
        return pieces

    def _begin_reasoning(self, is_end: bool) -> bool:
        """Look for the section's start; return False while that is undecided."""
        assert self._style is not None
        start, head = self._style.start, self._held.lstrip()
        if head.startswith(start):
            self._held = head[len(start) :]
            self._part = _Part.REASONING
        elif start.startswith(head) and not is_end:
            return False
        else:
            self._begin_text()
        return True

    def _take_reasoning(self, pieces: list[Piece], is_end: bool) -> bool:
        """Emit reasoning; return True once the section has ended."""
        assert self._style is not None
        if self._label and self._label.startswith(self._held) and self._held != self._label and not is_end:
            return False
        self._held, self._label = self._held.removeprefix(self._label), ""
        at = self._held.find(self._style.end)
        if at < 0:
            shown = self._release(0 if is_end else _num_held_with_blanks(self._held, self._style.end))
            if shown:
                pieces.append(Reasoning(shown))
            return False
        if at:
            pieces.append(Reasoning(self._held[:at]))
        self._held = self._held[at + len(self._style.end) :]
        self._skips_blanks = True
        self._begin_text()
        return True

    def _unwrap(self, is_end: bool) -> bool:
        """Look for the marker before the answer's text; return False while that is undecided."""
        assert self._wrapper is not None
        head, starts = self._held.lstrip(), self._wrapper.start
        found = next((start for start in starts if head.startswith(start)), None)
        if found is None and not is_end and any(start.startswith(head) for start in starts):
            return False
        self._part = _Part.TEXT
        if found is not None:
            self._held, self._end = head[len(found) :], self._wrapper.end
            self._skips_blanks = True
        return True

    def _take_content(self, pieces: list[Piece], is_end: bool) -> bool:
        """Emit text; return True if calls follow."""
        if self._skips_blanks:
            self._skip_blanks()
        tools = self._tools
        if tools is None:
            self._emit_text(pieces, 0, is_end=is_end)
            return False
        if not tools.marker or (tools.may_begin and not self._has_begun):
            is_known = self._take_anchored(pieces, tools, is_end)
            if not tools.marker or not is_known or self._part is _Part.CALLS:
                return self._part is _Part.CALLS
        markers = (tools.marker, *tools.openers)
        found = [(at, marker) for marker in markers if (at := self._held.find(marker, self._num_known)) >= 0]
        if found:
            at, marker = min(found)
            before = self._held[:at].rstrip()
            size_before = len(before)
            before = before.removesuffix(self._end).rstrip() if self._end else before
            if before:
                pieces.append(Content(before, self._num_read - len(self._held)))
                self._has_begun = self._has_text = True
            size = at + len(marker) if marker == tools.marker else at
            self._enter_calls(tools, self._held[size_before:size], self._held[size:])
            return True
        is_cut = is_end and self._must_call  # inside a marker, so not text to show
        held = max(_num_held_with_blanks(self._held, marker, self._num_known) for marker in markers)
        self._emit_text(pieces, held if is_cut or not is_end else 0, is_end=is_end)
        return False

    def _skip_blanks(self) -> None:
        """Drop the blanks after another part, but the last if it separates two texts."""
        text = self._held.lstrip("\n\r ")
        self._gap = self._held[: len(self._held) - len(text)][-1:] or self._gap
        self._skips_blanks = not text
        self._held = self._gap + text if text and self._has_text else text

    def _take_anchored(self, pieces: list[Piece], tools: ToolFormat, is_end: bool) -> bool:
        """Read an answer whose beginning decides if it is text (possibly JSON) or calls; return if it has."""
        head = self._held.lstrip()
        is_call: bool | None = False
        if not self._has_begun and not head:
            is_call = None
        elif not self._has_begun and head.startswith(tools.first):
            is_call = tools.begins(head, self._names)
        if is_call:
            self._has_begun = True
            self._enter_calls(tools, "", self._held)
            return True
        is_known = is_call is not None or is_end
        if (is_call is not None or (is_end and not self._must_call)) and not tools.marker:
            self._emit_text(pieces, 0, is_end=is_end)
        return is_known

    def _enter_calls(self, tools: ToolFormat, opening: str, rest: str) -> None:
        self._calls, self._opening, self._held = tools.parser(self._specs), opening, rest
        self._has_called = False
        self._part = _Part.CALLS

    def _read_calls(self, pieces: list[Piece]) -> bool:
        """Read calls; return True if they have ended and text follows."""
        assert self._calls is not None
        text, self._held = self._held, ""
        new = self._calls.push(text)
        self._has_called |= bool(new)
        pieces += new
        if self._calls.rest is not None:
            self._leave_calls(self._calls.rest)
        return self._calls is None

    def _leave_calls(self, rest: str) -> None:
        """Continue with text; if no call came, the supposed marker is part of the text."""
        self._calls = None
        self._part = _Part.TEXT
        self._held = rest if self._has_called else self._opening + rest
        self._num_known = 0 if self._has_called else len(self._opening) + 1
        self._skips_blanks, self._gap = self._has_called, ""

    def _emit_text(self, pieces: list[Piece], num_held: int, *, is_end: bool) -> None:
        if self._end:
            num_held = self._num_closing(num_held, is_end)
        start = self._num_read - len(self._held)
        shown = self._release(num_held)
        if shown:
            pieces.append(Content(shown, start))
            self._has_begun = self._has_text = True

    def _num_closing(self, num_held: int, is_end: bool) -> int:
        """Return how many characters to hold back, so that a closing wrapper is held back as well.

        `num_held` is how many are already held back. The end of the wrapper is not text if only calls follow
        it.
        """
        text = self._held[: len(self._held) - num_held]
        at = text.rfind(self._end)
        if at >= 0 and not text[at + len(self._end) :].strip():
            return len(self._held) - len(text[:at].rstrip())
        return num_held if is_end else num_held + _num_held_with_blanks(text, self._end)

    def _release(self, num_held: int) -> str:
        """Return the held text except for its last `num_held` characters."""
        size = len(self._held) - num_held
        shown, self._held = self._held[:size], self._held[size:]
        self._num_known = max(0, self._num_known - size)
        return shown


def _num_held_with_blanks(text: str, marker: str, num_known: int = 0) -> int:
    """Return how much of the end of `text` to hold: a possible start of the marker, and blanks before it.

    No marker starts in the first `num_known` characters.
    """
    size = num_held(text[num_known:], marker)
    shown = text[: len(text) - size]
    return size + len(shown) - len(shown.rstrip())
