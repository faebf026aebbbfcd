"""Parser for calls whose arguments are JSON objects; most families' format."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import CallArguments, CallStart, Piece
from tgi_asgi.text.tools.literals import Nesting, literal_value

# Beginnings of calls that are objects: a name, possibly after an id, or the name as the key.
NAMED = re.compile(
    r'\{\s*(?:"tool_call_id"\s*:\s*"[^"]*"\s*,\s*)?'
    r'"(?:tool_)?name"\s*:\s*"([^"]{1,128})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(\{\s*["}])'
)
KEYED = re.compile(r'\{\s*"([^"]{1,128})"\s*:\s*(\{\s*["}])')
# The end of a call that is an object, after its arguments and possibly an id.
_TAIL = re.compile(r'\s*(?:,\s*"\w+"\s*:\s*(?:"[^"]*"|[\w.]+)\s*)?\}')
_IN_TAIL = re.compile(r'\s*(?:,\s*(?:"\w*(?:"\s*(?::\s*(?:(?:"[^"]*"?|[\w.]+)\s*)?)?)?)?)?')
_MAX_HEAD = _MAX_TAIL = 256  # characters; after each, the whole head or tail is matched again
_CLOSERS = ("```", "}", "]", ",", ";")
_OPENERS = ("```json", "```", "[")


class JsonCallParser:
    """A parser of `{"name": "f", "arguments": {...}}`, or of what `head` matches before an object.

    Arguments are emitted as they are written if the call has the form that the model was trained on.
    Otherwise (keys in another order, arguments as a string, Python's quotes) they are emitted once the call
    is complete. Everything except the arguments is read one character at a time, so that the output does not
    depend on how the text was cut.

    Args:
        openers: Texts that may precede a call, besides fences and brackets.
        closers: Texts that may follow a call.
        head: Beginning of a call: group 1 is the name, group 2 the beginning of the arguments.
        object_head: The same for a call that is an object.
        is_bare: Whether a name needs nothing before it.
    """

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        *,
        openers: Sequence[str] = (),
        closers: Sequence[str] = (),
        head: re.Pattern[str] | None = None,
        object_head: re.Pattern[str] = NAMED,
        is_bare: bool = False,
    ) -> None:
        self.rest: str | None = None
        self._names = {tool.name for tool in tools}
        self._openers, self._closers = {*_OPENERS, *openers}, {*_CLOSERS, *closers}
        self._head, self._object_head, self._is_bare = head, object_head, is_bare
        self._buffer = ""
        self._opening = ""  # skipped text, which counts as text if no call follows
        self._has_called = False
        self._nesting: Nesting | None = None  # of a call whose head is being read
        self._arguments: _ObjectScanner | None = None
        self._is_in_tail = False

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text."""
        pieces: list[Piece] = []
        self._feed(text, pieces)
        return pieces

    def finish(self) -> str:
        """Return the text that looked like the start of a call but is none, at the end of the answer."""
        is_begun = self._nesting is not None or self._opening.strip() or not self._has_called
        return self._opening + self._buffer if is_begun and not self._is_in_tail else ""

    def _feed(self, text: str, pieces: list[Piece]) -> None:
        at = 0
        while at < len(text) and self.rest is None:
            if self._arguments is not None:
                at += self._read_arguments(text[at:], pieces)
                continue
            self._buffer += text[at]
            at += 1
            if self._is_in_tail:
                self._read_tail(pieces)
            elif self._nesting is not None:
                self._read_head(text[at - 1], pieces)
            else:
                self._skip(pieces)
        if self.rest is not None:
            self.rest += text[at:]

    def _skip(self, pieces: list[Piece]) -> None:
        """Look for the next call, after blanks, markers, fences and brackets."""
        text = self._buffer.lstrip()
        marks = self._openers | self._closers
        if not text or any(mark.startswith(text) and mark != text for mark in marks):
            return
        mark = max((mark for mark in marks if text.startswith(mark)), key=len, default=None)
        if mark is not None:
            if not self._has_called or self._opening or mark not in self._closers:
                self._opening += self._buffer[: self._buffer.index(mark) + len(mark)]
            self._reparse(text[len(mark) :], pieces)
        elif text[0] == "{" or self._may_be_name(text[0]):
            self._opening += self._buffer[: -len(text)]
            self._nesting = Nesting()
            self._reparse(text, pieces)
        else:
            self._give_up()

    def _may_be_name(self, first: str) -> bool:
        is_bare = self._is_bare and any(name.startswith(first) for name in self._names)
        is_opened = bool(self._opening) or not self._has_called or is_bare
        return self._head is not None and is_opened and (first.isalnum() or first == "_")

    def _read_head(self, character: str, pieces: list[Piece]) -> None:
        assert self._nesting is not None
        is_object = self._buffer[0] == "{"
        head = self._object_head if is_object or self._head is None else self._head
        found = head.fullmatch(self._buffer) if len(self._buffer) <= _MAX_HEAD else None
        is_complete = self._nesting.push(character) == 0
        if found and found[1] in self._names:
            self._begin(found[1], pieces)
            self._arguments, self._is_in_tail = _ObjectScanner(), is_object
            self._feed(found[2], pieces)
        elif is_object and is_complete:
            call = _call_of(self._buffer, self._names)
            if call is None:
                self._give_up()
                return
            self._begin(call[0], pieces)
            pieces.append(CallArguments(call[1]))
        elif not is_object and (len(self._buffer) > _MAX_HEAD or self._is_no_name()):
            self._give_up()

    def _is_no_name(self) -> bool:
        """Return whether the buffer should begin with a bare name but does not."""
        name, *rest = self._buffer.split(None, 1) or [""]
        if not self._is_bare or rest:
            return self._is_bare and rest != [] and name not in self._names
        return not any(each.startswith(name) for each in self._names)

    def _begin(self, name: str, pieces: list[Piece]) -> None:
        pieces.append(CallStart(name))
        self._buffer = self._opening = ""
        self._nesting, self._has_called = None, True

    def _read_arguments(self, text: str, pieces: list[Piece]) -> int:
        assert self._arguments is not None
        size = self._arguments.scan(text)
        pieces.append(CallArguments(text[:size]))
        if self._arguments.is_done:
            self._arguments = None
        return size

    def _read_tail(self, pieces: list[Piece]) -> None:
        if _TAIL.fullmatch(self._buffer):
            self._buffer, self._is_in_tail = "", False
        elif len(self._buffer) > _MAX_TAIL or not _IN_TAIL.fullmatch(self._buffer):
            self._is_in_tail = False
            self._reparse(self._buffer, pieces)

    def _reparse(self, text: str, pieces: list[Piece]) -> None:
        self._buffer = ""
        self._feed(text, pieces)

    def _give_up(self) -> None:
        text = self._opening + self._buffer
        self.rest = text
        self._buffer = self._opening = ""


def _call_of(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """Return name and arguments of a call that is a whole object, or None."""
    call = literal_value(text)
    if isinstance(call, dict) and isinstance(call.get("function"), dict):  # as in OpenAI's API
        call = call["function"]
    if not isinstance(call, dict):
        return None
    if len(call) == 1 and (key := next(iter(call))) in names:
        return (key, dumped(call[key])) if isinstance(call[key], dict) else None
    name = call.get("name", call.get("tool_name"))
    if not isinstance(name, str) or name not in names:
        return None
    arguments: Any = next((call[key] for key in ("arguments", "parameters") if key in call), {})
    if isinstance(arguments, str):
        arguments = literal_value(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    return (name, dumped(arguments)) if isinstance(arguments, dict) else None


class _ObjectScanner:
    """A scanner for the end of a JSON object in a stream of text."""

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
