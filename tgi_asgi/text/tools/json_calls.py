"""Parser for calls whose arguments are JSON objects; most families' format."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import CallArguments, Piece
from tgi_asgi.text.tools.call_reader import CallReader
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


class JsonCallParser(CallReader):
    """A parser of `{"name": "f", "arguments": {...}}`, or of what `head` matches before an object.

    Arguments are emitted as they are written if the call has the form that the model was trained on.
    Otherwise (keys in another order, arguments as a string, Python's quotes) they are emitted once the call
    is complete.

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
        super().__init__()
        self._names = {tool.name for tool in tools}
        self._openers, self._closers = {*_OPENERS, *openers}, {*_CLOSERS, *closers}
        self._head, self._object_head, self._is_bare = head, object_head, is_bare
        self._nesting: Nesting | None = None  # of a call whose head is being read

    def finish(self) -> str:
        """Return the text that resembled a call but is none; nothing of a call whose arguments have begun."""
        return self._skipped + self._held if self._nesting is not None else super().finish()

    def _read_head(self, pieces: list[Piece]) -> str:
        return self._read_before() if self._nesting is None else self._read_beginning(pieces)

    def _read_before(self) -> str:
        """Skip blanks, markers, fences and brackets, up to the first character of a call."""
        text = self._held.lstrip()
        num_blanks = len(self._held) - len(text)
        marks = self._openers | self._closers
        if not text or any(mark.startswith(text) and mark != text for mark in marks):
            return ""
        mark = max((mark for mark in marks if text.startswith(mark)), key=len, default=None)
        if mark is not None:
            may_be_text = not self._has_called or bool(self._skipped) or mark not in self._closers
            return self._skip(num_blanks + len(mark), may_be_text=may_be_text)
        if text[0] == "{" or self._may_be_name(text[0]):
            self._nesting = Nesting()
            return self._skip(num_blanks)
        self._give_up()
        return ""

    def _may_be_name(self, first: str) -> bool:
        is_bare = self._is_bare and any(name.startswith(first) for name in self._names)
        is_opened = bool(self._skipped) or not self._has_called or is_bare
        return self._head is not None and is_opened and (first.isalnum() or first == "_")

    def _read_beginning(self, pieces: list[Piece]) -> str:
        """Read a call up to its arguments, or all of it if it does not begin as `head` says."""
        assert self._nesting is not None
        is_object = self._held[0] == "{"
        head = self._object_head if is_object or self._head is None else self._head
        found = head.fullmatch(self._held) if len(self._held) <= _MAX_HEAD else None
        is_complete = self._nesting.push(self._held[-1]) == 0
        if found and found[1] in self._names:
            self._nesting = None
            self._begin_call(found[1], JsonArguments(has_tail=is_object), pieces)
            return found[2]
        if is_object and is_complete:
            call = _call_of(self._held, self._names)
            if call is None:
                self._give_up()
                return ""
            self._nesting = None
            self._begin_call(call[0], None, pieces)
            pieces.append(CallArguments(call[1]))
        elif not is_object and (len(self._held) > _MAX_HEAD or self._is_no_name()):
            self._give_up()
        return ""

    def _is_no_name(self) -> bool:
        """Return whether the held text should begin with a bare name but does not."""
        name, *rest = self._held.split(None, 1) or [""]
        if not self._is_bare or rest:
            return self._is_bare and rest != [] and name not in self._names
        return not any(each.startswith(name) for each in self._names)


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


class JsonArguments:
    """The arguments of one call, a JSON object, passed on as they are written.

    Args:
        has_tail: Whether the call is an object itself, so that its closing brace follows.

    Attributes:
        have_ended: Whether the call's last character has been read.
    """

    def __init__(self, *, has_tail: bool) -> None:
        self.have_ended = False
        self._object = _ObjectScanner()
        self._has_tail = has_tail
        self._tail = ""  # what has been read of it

    def push(self, text: str) -> tuple[str, str]:
        """Return the JSON that is certain now, and what follows the call."""
        size = 0
        if not self._object.is_done:
            size = self._object.scan(text)
            self.have_ended = self._object.is_done and not self._has_tail
        written, at = text[:size], size
        while at < len(text) and not self.have_ended:
            self._tail += text[at]
            at += 1
            if _TAIL.fullmatch(self._tail):
                self.have_ended = True
            elif len(self._tail) > _MAX_TAIL or not _IN_TAIL.fullmatch(self._tail):
                self.have_ended = True
                return written, self._tail + text[at:]  # the call's end is missing
        return written, text[at:]


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
