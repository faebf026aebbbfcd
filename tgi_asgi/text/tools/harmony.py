"""Harmony, gpt-oss's format: an answer is a series of messages in channels: reasoning, calls and text.

    <|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>text<|return|>
    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>

Its parser replaces `AnswerParser`, because nothing in an answer is outside a message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import CallArguments, CallStart, Content, Piece, Reasoning, num_held

NAME = "openai"  # for administrators; vLLM's name
FAMILIES = "gpt-oss"
MARKERS = (
    "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip

# The marks before and after reasoning, and those of the answer that follows it.
REASONING = (
    "<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant<|channel|>final<|message|>",
)  # fmt: skip

_MESSAGE = "<|message|>"
_OPENERS = ("<|start|>", "<|channel|>")  # of a header
_ENDS = ("<|end|>", "<|call|>", "<|return|>", *_OPENERS)
_BEGINS = (*_OPENERS, "assistant", "to=")
_OPENER = re.compile("|".join(map(re.escape, _OPENERS)))
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
_BETWEEN = "\n\n"  # after a message, before the next of its kind
_MAX_HEADER = 512  # characters; a longer header without a message is text


def recognises(template: str) -> bool:
    """Return whether a chat template's source shows that its model writes this format."""
    return "<|channel|>analysis<|message|>" in template


def is_open(prompt: str) -> bool:
    """Return whether a prompt ends inside a reasoning message."""
    return prompt.rstrip().endswith("<|channel|>analysis<|message|>")


class HarmonyParser:
    """An incremental parser of an answer, as `AnswerParser`.

    Args:
        specs: Tools that may be called; a call of another tool is text.
        is_reasoning_open: Whether the prompt has opened a reasoning message.
        must_call: Whether the grammar allows only a call after the reasoning.
    """

    def __init__(
        self, specs: Sequence[ToolSpec] = (), *, is_reasoning_open: bool = False, must_call: bool = False
    ) -> None:
        self._names = {spec.name for spec in specs}
        self._must_call = must_call
        self._held = ""
        self._num_read = 0
        self._header = ""  # of the current message, as written
        # Of the current message; None inside a header.
        self._kind: type[Reasoning] | type[Content] | type[CallStart] | None = None
        self._name: str | None = None  # of the call, until its arguments begin
        self._shown: set[type[object] | None] = set()  # kinds of earlier messages with text
        self._has_text = False  # whether the current message has some
        if is_reasoning_open:
            self._kind = Reasoning

    @property
    def is_reasoning(self) -> bool:
        """Whether the text is inside a reasoning message."""
        return self._kind is Reasoning

    @property
    def is_content(self) -> bool:
        """Whether the text is inside a message that is neither reasoning nor a call."""
        return self._kind is Content

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text."""
        self._held += text
        self._num_read += len(text)
        return self._read(is_end=False)

    def finish(self) -> list[Piece]:
        """Return the pieces that were held back, at the end of the answer."""
        return self._read(is_end=True)

    def _read(self, *, is_end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._read_header(pieces, is_end) if self._kind is None else self._read_body(pieces, is_end):
            pass
        return pieces

    def _read_header(self, pieces: list[Piece], is_end: bool) -> bool:
        """Read up to a message's text; return False while it has not begun."""
        head = self._held.lstrip()
        if not head:
            return False
        if not any(head.startswith(each) or each.startswith(head) for each in _BEGINS):
            return self._begin_text()
        at = self._held.find(_MESSAGE, 0, _MAX_HEADER)
        if at >= 0:
            self._begin_message(pieces, at + len(_MESSAGE))
            return True
        if is_end and (head.startswith(_OPENERS) or self._must_call):  # cut inside a header: not shown
            self._held = ""
            return False
        if is_end:
            return self._begin_text()
        if len(self._held) < _MAX_HEADER:
            return False
        # Drop the markers: one would end the text and begin the same header, forever.
        marks = list(_OPENER.finditer(self._held, 0, _MAX_HEADER))
        self._held = self._held[marks[-1].end() if marks else 0 :]
        return self._begin_text()

    def _begin_text(self) -> bool:
        """Begin a message of text without a header."""
        self._kind, self._header = Content, ""
        return True

    def _begin_message(self, pieces: list[Piece], size: int) -> None:
        """Begin a message whose header has this many characters."""
        self._header, self._held = self._held[:size], self._held[size:]
        channel, recipient = _CHANNEL.search(self._header), _RECIPIENT.search(self._header)
        if recipient is not None and recipient[1] in self._names:
            self._kind, self._name = CallStart, recipient[1]
        elif channel is not None and channel[1] == "analysis":
            self._kind = Reasoning
        else:
            self._kind = Content
            if recipient is not None and recipient[1] != "assistant":  # a call of an unknown tool: text
                self._show(pieces, self._header, len(self._held))

    def _read_body(self, pieces: list[Piece], is_end: bool) -> bool:
        """Emit a message's text; return True once it has ended."""
        found = [(at, end) for end in _ENDS if (at := self._held.find(end)) >= 0]
        at, end = min(found) if found else (len(self._held), "")
        held = 0 if found or is_end else max(num_held(self._held, each) for each in _ENDS)
        text, rest = self._held[: at - held], self._held[at - held :]
        if self._kind is CallStart:
            self._call(pieces, text, is_end=bool(found) or is_end, rest=len(rest))
        elif self._kind is Reasoning:
            if text:
                pieces += self._gap(Reasoning(_BETWEEN))
                pieces.append(Reasoning(text))
        else:
            self._show(pieces, text, len(rest))
        self._held = rest
        if found:
            self._held = rest if end in _OPENERS else rest[len(end) :]
            if self._has_text:
                self._shown.add(self._kind)
            self._kind, self._header, self._has_text = None, "", False
        return bool(found)

    def _gap(self, between: Reasoning | Content) -> list[Piece]:
        """Return what precedes the next text of a message, if it is the first after another message."""
        is_first, self._has_text = not self._has_text, True
        return [between] if is_first and type(between) in self._shown else []

    def _call(self, pieces: list[Piece], text: str, *, is_end: bool, rest: int) -> None:
        """Emit a piece of a call; a call whose arguments are not an object is text."""
        if self._name is not None:
            begun = text.lstrip()
            if not begun and not is_end:
                self._header += text  # also shown if no object follows
                return
            if begun and not begun.startswith("{"):
                self._kind = Content
                self._show(pieces, self._header + text, rest)
                self._name = None
                return
            pieces.append(CallStart(self._name))
            self._name = None
            text = begun or "{}"
        if text:
            pieces.append(CallArguments(text))

    def _show(self, pieces: list[Piece], text: str, num_after: int) -> None:
        if text:
            start = self._num_read - num_after - len(text)
            pieces += self._gap(Content(_BETWEEN, start))
            pieces.append(Content(text, start))
