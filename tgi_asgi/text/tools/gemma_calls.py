"""Parser for Gemma's calls: `call:f{key:value,...}`, with a special token as the quotes of strings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import Piece, num_held
from tgi_asgi.text.tools.call_reader import CallReader
from tgi_asgi.text.tools.literals import as_json, literal_value
from tgi_asgi.text.tools.odd_names import OddNames

_CALL = "call:"
_END_OF_SCALAR = re.compile(r"[,}\]]")
_BETWEEN = " \t\r\n,]"  # characters to skip before a key; a stray bracket is one of them
_NAME = r'[^\s{}:,"\]]([^{}:]*[^\s{}:"])?'  # of an argument, as it is read up to the colon


class GemmaCallParser(CallReader):
    """A parser that emits arguments while they are written."""

    def __init__(self, tools: Sequence[ToolSpec], *, marker: str, end: str, quote: str) -> None:
        super().__init__()
        self._specs = {tool.name: tool for tool in tools}
        self._marker, self._end, self._quote = marker, end, quote

    def _read_head(self, pieces: list[Piece]) -> str:
        text = self._held.lstrip()
        name, brace, _ = text.removeprefix(_CALL).partition("{")
        if text.startswith(_CALL) and brace and name in self._specs:
            self._begin_call(name, GemmaArguments(self._quote, self._end, self._specs[name]), pieces)
        elif text in (self._marker, self._end):
            return self._skip(len(self._held), may_be_text=text == self._marker or not self._has_called)
        elif not (
            any(mark.startswith(text) for mark in (self._marker, self._end, _CALL))
            or (text.startswith(_CALL) and any(each.startswith(name) for each in self._specs) and not brace)
        ):
            self._give_up()
        return ""


class GemmaArguments:
    """The arguments of one call, `a:1,b:[...]}`, turned into a JSON object while they are written.

    Text in quotes is passed on as it comes, everything else once it is complete. Brackets that do not match
    are put right: `}` ends the lists in its object, too.

    Args:
        end: Text after the call, which also ends a string in plain quotes whose second quote is missing.
        spec: The tool, whose schema decides whether a text stands for a number.

    Attributes:
        have_ended: Whether the closing bracket has been read.
    """

    def __init__(self, quote: str, end: str, spec: ToolSpec) -> None:
        self.have_ended = False
        self._quote, self._end, self._listed = quote, end, spec.arguments
        self._odd_names = OddNames(_names_in(spec.schema), _NAME, behind=":")
        self._buffer = ""
        self._num_known = 0  # leading characters of the buffer that have been searched
        self._closers = ["}"]  # of the open containers
        self._are_empty = [True]  # the same containers
        self._out: list[str] = []
        self._opening = "{"  # held back until there is a key: a cut call then shows no arguments
        self._read: Callable[[], bool] = self._read_key
        self._schema: Any = None  # of the argument that is being read
        self._is_plain = False  # whether a plain quote begins no string

    def push(self, text: str) -> tuple[str, str]:
        """Return the JSON that is certain now, and what follows the arguments."""
        self._buffer += text
        while self._buffer and not self.have_ended and self._read():
            pass
        written, self._out = "".join(self._out), []
        return written, self._buffer if self.have_ended else ""

    # Each of these reads one element of the buffer; it returns False if it needs more text.

    def _read_key(self) -> bool:
        if not self._num_known:
            self._buffer = self._buffer.lstrip(_BETWEEN)
            if self._odd_names.may_begin(self._buffer):
                return False
            if (name := self._odd_names.match(self._buffer)) is not None:
                self._take(len(name))
                self._begin_value(name)
                return True
            if self._buffer.startswith("}"):
                self._take(1)
                self._close()
                return True
        at = self._buffer.find(":", self._num_known)
        has_brace = self._buffer.find("}", self._num_known) >= 0
        closing = _unmatched(self._buffer[: at if at >= 0 else None]) if has_brace else None
        if closing is not None:  # a key without a value
            self._take(closing + 1)
            self._close()
            return True
        if at < 0:
            self._num_known = len(self._buffer)
            return False
        self._begin_value(self._take(at).strip().strip('"'))
        return True

    def _begin_value(self, key: str) -> None:
        """Take the colon after a key."""
        self._take(1)
        if len(self._closers) == 1:
            self._schema = self._listed.schema(key)
        self._begin_item()
        self._write(f"{dumped(key)}: ")
        self._read = self._read_value

    def _read_value(self) -> bool:
        is_in_list = self._closers[-1] == "]"
        self._buffer = self._buffer.lstrip(" \t\r\n," if is_in_list else " \t\r\n")
        first = self._buffer[:1]
        if is_in_list and first in ("]", "}"):
            if first == "]":
                self._take(1)
            self._close()
        elif self._quote.startswith(self._buffer[: len(self._quote)]):
            if len(self._buffer) < len(self._quote):
                return False
            self._take(len(self._quote))
            self._begin_item_of_list()
            if self._is_text():
                self._write('"')
                self._read = self._read_text
            else:
                self._read = self._read_quoted_value
        elif first in ("{", "["):
            self._take(1)
            self._begin_item_of_list()
            self._write(first)
            self._closers.append("}" if first == "{" else "]")
            self._are_empty.append(True)
            self._read = self._read_key if first == "{" else self._read_value
        else:
            self._begin_item_of_list()
            self._read = self._read_scalar if first != '"' or self._is_plain else self._read_plain_quotes
        return True

    def _read_text(self) -> bool:
        at = self._buffer.find(self._quote)
        if at < 0:
            known = self._take(len(self._buffer) - num_held(self._buffer, self._quote))
            self._write(dumped(known)[1:-1])
            return False
        self._write(dumped(self._take(at))[1:])
        self._take(len(self._quote))
        self._end_value()
        return True

    def _read_quoted_value(self) -> bool:
        """Read a value that, by the schema, is not a text: FunctionGemma quotes numbers, too."""
        at = self._buffer.find(self._quote, self._num_known)
        if at < 0:
            self._num_known = max(0, len(self._buffer) - len(self._quote) + 1)
            return False
        self._write(_json_of(self._take(at)))
        self._take(len(self._quote))
        self._end_value()
        return True

    def _read_plain_quotes(self) -> bool:
        """Read a string as JSON writes it, if it has both quotes."""
        at = self._buffer.find('"', max(self._num_known, 1))
        while at >= 0 and _is_escaped(self._buffer, at):
            at = self._buffer.find('"', at + 1)
        end = self._buffer.find(self._end, max(0, self._num_known - len(self._end)))
        if 0 <= end < at or (at < 0 <= end):
            self._is_plain, self._num_known = True, 0
            self._read = self._read_scalar
            return True
        if at < 0:
            self._num_known = len(self._buffer)
            return False
        written = self._take(at + 1)
        value = literal_value(written)
        text = value if isinstance(value, str) else written[1:-1]
        self._write(dumped(text) if self._is_text() else _json_of(text))
        self._end_value()
        return True

    def _read_scalar(self) -> bool:
        found = _END_OF_SCALAR.search(self._buffer, self._num_known)
        if found is None:
            self._num_known = len(self._buffer)
            return False
        self._write(_json_of(self._take(found.start()).strip()))
        self._end_value()
        return True

    def _begin_item(self) -> None:
        if not self._are_empty[-1]:
            self._write(", ")
        self._are_empty[-1] = False

    def _begin_item_of_list(self) -> None:
        if self._closers[-1] == "]":
            self._begin_item()

    def _end_value(self) -> None:
        self._read = self._read_value if self._closers[-1] == "]" else self._read_key

    def _close(self) -> None:
        """End the innermost container."""
        self._write(self._closers.pop())
        self._are_empty.pop()
        self.have_ended = not self._closers
        if not self.have_ended:
            self._end_value()

    def _is_text(self) -> bool:
        """Return whether a string may be an argument's value; values within values have no known type."""
        if len(self._closers) > 1 or not isinstance(self._schema, Mapping):
            return True
        kind = self._schema.get("type")
        return kind in (None, "string") or (isinstance(kind, list) and "string" in kind)

    def _take(self, size: int) -> str:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        self._num_known = 0
        return taken

    def _write(self, text: str) -> None:
        self._out.append(self._opening + text)
        self._opening = ""


def _names_in(schema: Mapping[str, Any]) -> Iterable[str]:
    """Return the names of the items of all objects that a schema describes, however deep."""
    names: dict[str, None] = {}
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, Mapping):
            properties = part.get("properties")
            names |= dict.fromkeys(properties) if isinstance(properties, Mapping) else {}
            parts += part.values()
    return names


def _unmatched(text: str) -> int | None:
    """Return where a text closes a brace that it has not opened."""
    depth = 0
    for found in re.finditer("[{}]", text):
        depth += 1 if found[0] == "{" else -1
        if depth < 0:
            return found.start()
    return None


def _is_escaped(text: str, at: int) -> bool:
    """Return whether an odd number of backslashes precedes a character."""
    begin = at
    while begin and text[begin - 1] == "\\":
        begin -= 1
    return (at - begin) % 2 == 1


def _json_of(text: str) -> str:
    """Return a value as JSON; a value that is neither JSON nor Python is a string."""
    written = as_json(text)
    return dumped(text) if written is None else written
