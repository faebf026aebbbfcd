"""Split one choice's text while it is generated: reasoning, content, tool calls.

Created by `api` for each choice that may have more than content; knows no wire format.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import CallParser, Content, Piece, Reasoning, ToolFormat
from tgi_asgi.text.tools.held_text import HeldText, num_held_with_blanks
from tgi_asgi.text.tools.reasoning import ReasoningStyle, Wrapper


class _State(enum.Enum):
    """What the parser reads next, in the order of an answer; the first and the last two recur."""

    START = enum.auto()  # a reasoning section may begin here, again after another
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
        early: What must follow a marker of calls inside the reasoning for a call to end it, without blanks;
            None if no call does.
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
        early: str | None = None,
    ) -> None:
        self._style = style
        self._names = {spec.name for spec in specs}
        self._must_call = must_call
        self._tools = tools
        self._early = early
        self._is_early = False  # whether the calls have begun inside the reasoning
        self._specs = specs
        self._calls: CallParser | None = None
        self._held = HeldText()
        self._opening = ""  # the marker that led to the calls, with the blanks before it
        self._has_called = False  # since that marker
        self._has_begun = False  # with text, or with a call that only an answer's beginning may be
        self._has_text = False  # whether some has been emitted
        self._label = style.label if style is not None else ""  # while it may follow
        self._has_reasoned = False
        self._gap = ""  # between two sections
        self._end = wrapper.end if wrapper is not None and not wrapper.start else ""  # once it has begun
        self._wrapper = wrapper
        self._state = _State.START
        if is_reasoning_open:
            self._state = _State.REASONING
        elif style is None:
            self._begin_text()

    @property
    def is_reasoning(self) -> bool:
        """Whether the text is inside the reasoning section."""
        return self._state is _State.REASONING

    def _begin_text(self) -> None:
        may_be_wrapped = self._wrapper is not None and self._wrapper.start
        self._state = _State.WRAPPER if may_be_wrapped else _State.TEXT

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text."""
        return self._read(is_end=False) if self._held.push(text) else []

    def finish(self) -> list[Piece]:
        """Return the pieces that were held back, at the end of the answer."""
        self._held.add_blanks()
        pieces = self._read(is_end=True) if self._calls is None else []
        if self._calls is not None:
            self._leave_calls(self._calls.finish())
            if self._state is _State.REASONING:
                pieces += self._read(is_end=True)
            elif not self._must_call:
                self._emit_text(pieces, 0, is_end=True)
        return pieces

    def _read(self, *, is_end: bool) -> list[Piece]:
        """Go from state to state, until one needs more text."""
        pieces: list[Piece] = []
        is_ended = True
        while is_ended:
            match self._state:
                case _State.START:
                    is_ended = self._begin_reasoning(is_end)
                case _State.REASONING:
                    is_ended = self._take_reasoning(pieces, is_end)
                case _State.WRAPPER:
                    is_ended = self._unwrap(is_end)
                case _State.TEXT:
                    is_ended = self._take_content(pieces, is_end)
                case _State.CALLS:
                    is_ended = self._read_calls(pieces)
        return pieces

    def _begin_reasoning(self, is_end: bool) -> bool:
        """Look for the section's start; return False while that is undecided."""
        assert self._style is not None
        start, head = self._style.start, self._held.text.lstrip()
        if head.startswith(start):
            self._held.drop_marker(start)
            self._state, self._label = _State.REASONING, self._style.label
        elif start.startswith(head) and not is_end:
            return False
        else:
            self._begin_text()
        return True

    def _take_reasoning(self, pieces: list[Piece], is_end: bool) -> bool:
        """Emit reasoning; return True once the section has ended."""
        assert self._style is not None
        held, end = self._held, self._style.end
        if self._label and self._label.startswith(held.text) and held.text != self._label and not is_end:
            return False
        if held.text.startswith(self._label):
            held.take(len(self._label))
        self._label = ""
        found = held.find([end])
        early = self._find_early_call(found[0] if found else len(held.text), is_end)
        if early is not None:
            return self._begin_early_call(pieces, early)
        ends = [end] if self._early is None or self._tools is None else [end, self._tools.marker]
        num_undecided = 0 if is_end else max(map(held.num_undecided, ends))
        self._show_reasoning(pieces, held.take(found[0]) if found else held.release(num_undecided))
        if found:
            held.take(len(end))
            held.skip_blanks()
            self._gap = "\n\n" if self._has_reasoned else ""
            self._state = _State.START  # some models begin another section at once
        return found is not None

    def _show_reasoning(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(Reasoning(self._gap + text))
            self._gap, self._has_reasoned = "", True

    def _find_early_call(self, end: int, is_end: bool) -> int | None:
        """Return where a call begins, or may begin, inside the reasoning, which goes up to `end` at most."""
        while self._early is not None and self._tools is not None:
            found = self._held.find([self._tools.marker])
            if found is None or found[0] >= end:
                return None
            follows = "".join(self._held.text[found[0] + len(found[1]) :].split())
            if follows.startswith(self._early) or (self._early.startswith(follows) and not is_end):
                return found[0]
            self._held.put_back(self._held.text, num_known=found[0] + 1)
        return None

    def _begin_early_call(self, pieces: list[Piece], at: int) -> bool:
        """Emit the reasoning before a marker of calls; return False while no call is certain."""
        assert self._tools is not None and self._early is not None
        self._show_reasoning(pieces, self._held.take(len(self._held.text[:at].rstrip())))
        marked = self._held.text.lstrip().removeprefix(self._tools.marker)
        if not "".join(marked.split()).startswith(self._early):
            return False
        self._is_early = True
        self._enter_calls(self._tools, opening=self._held.release(len(marked)))
        return True

    def _unwrap(self, is_end: bool) -> bool:
        """Look for the marker before the answer's text; return False while that is undecided."""
        assert self._wrapper is not None
        head, starts = self._held.text.lstrip(), self._wrapper.start
        found = next((start for start in starts if head.startswith(start)), None)
        if found is None and not is_end and any(start.startswith(head) for start in starts):
            return False
        self._state = _State.TEXT
        if found is not None:
            self._held.drop_marker(found)
            self._held.skip_blanks()
            self._end = self._wrapper.end
        return True

    def _take_content(self, pieces: list[Piece], is_end: bool) -> bool:
        """Emit text; return True if calls follow."""
        self._held.drop_skipped(keeps_last=self._has_text)
        tools = self._tools
        if tools is None:
            self._emit_text(pieces, 0, is_end=is_end)
            return False
        if not tools.marker or (tools.may_begin and not self._has_begun):
            is_known = self._take_anchored(pieces, tools, is_end)
            if not tools.marker or not is_known or self._state is _State.CALLS:
                return self._state is _State.CALLS
        markers = (tools.marker, *tools.openers)
        found = self._held.find(markers)
        if found is not None:
            at, marker = found
            size = at + len(marker) if marker == tools.marker else at
            size_before = self._emit_before(pieces, at)
            self._enter_calls(tools, opening=self._held.take(size - size_before))
            return True
        is_cut = is_end and self._must_call  # inside a marker, so not text to show
        num_held = max(map(self._held.num_undecided, markers)) if is_cut or not is_end else 0
        self._emit_text(pieces, num_held, is_end=is_end)
        return False

    def _emit_before(self, pieces: list[Piece], at: int) -> int:
        """Emit the text before a marker of calls, without blanks at its end; return its size."""
        start = self._held.start
        before = self._held.take(len(self._held.text[:at].rstrip()))
        shown = before.removesuffix(self._end).rstrip() if self._end else before
        self._show(pieces, shown, start)
        return len(before)

    def _take_anchored(self, pieces: list[Piece], tools: ToolFormat, is_end: bool) -> bool:
        """Read an answer whose beginning tells text (perhaps JSON) from calls; return whether it has."""
        head = self._held.text.lstrip()
        is_call: bool | None = False
        if not self._has_begun and not head:
            is_call = None
        elif not self._has_begun:
            is_call = tools.begins(head, self._names)
        if is_call:
            self._has_begun = True
            self._enter_calls(tools, opening="")
            return True
        is_known = is_call is not None or is_end
        if (is_call is not None or (is_end and not self._must_call)) and not tools.marker:
            self._emit_text(pieces, 0, is_end=is_end)
        return is_known

    def _enter_calls(self, tools: ToolFormat, *, opening: str) -> None:
        """Let the format's parser read what is held now, and what follows."""
        self._calls, self._opening = tools.parser(self._specs), opening
        self._has_called = False
        self._state = _State.CALLS

    def _read_calls(self, pieces: list[Piece]) -> bool:
        """Read calls; return True if they have ended and text follows."""
        assert self._calls is not None
        new = self._calls.push(self._held.release(0))
        self._has_called |= bool(new)
        pieces += new
        if self._calls.rest is not None:
            self._leave_calls(self._calls.rest)
        return self._calls is None

    def _leave_calls(self, rest: str) -> None:
        """Continue with text; if no call came, the supposed marker is part of the text.

        read                     Let me see: <tool_call>{"a": 1} is JSON.
        shown                    Let me see:
        opening                             <tool_call>
        rest                                           {"a": 1} is JSON.
        held before
        held after                          <tool_call>{"a": 1} is JSON.
        searched for markers                            "a": 1} is JSON.
        """
        self._calls = None
        was_early, self._is_early = self._is_early, False
        self._state = _State.TEXT
        if was_early and not self._has_called:  # its marker is not searched again
            self._state = _State.REASONING
            num_blanks = len(self._opening) - len(self._opening.lstrip())
            self._held.put_back(self._opening + rest, num_known=num_blanks + 1)
        elif self._has_called:
            self._held.put_back(rest)
            self._held.skip_blanks()
        else:
            # An alternative opener is not in `opening` but begins the rest. It must not be found again.
            self._held.put_back(self._opening + rest, num_known=len(self._opening) + 1)

    def _emit_text(self, pieces: list[Piece], num_held: int, *, is_end: bool) -> None:
        if self._end:
            num_held = self._num_closing(num_held, is_end)
        start = self._held.start
        self._show(pieces, self._held.release(num_held), start)

    def _show(self, pieces: list[Piece], text: str, start: int) -> None:
        if text:
            pieces.append(Content(text, start))
            self._has_begun = self._has_text = True

    def _num_closing(self, num_held: int, is_end: bool) -> int:
        """Return how many characters to hold back, so that a closing wrapper is held back as well.

        `num_held` is how many are already held back. The end of the wrapper is not text if only calls follow
        it.
        """
        held = self._held.text
        text = held[: len(held) - num_held]
        at = text.rfind(self._end)
        if at >= 0 and not text[at + len(self._end) :].strip():
            return len(held) - len(text[:at].rstrip())
        return num_held if is_end else num_held + num_held_with_blanks(text, self._end)
