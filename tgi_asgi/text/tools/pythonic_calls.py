"""Parser for calls written as Python."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Sequence

from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import Piece
from tgi_asgi.text.tools.call_reader import CallReader
from tgi_asgi.text.tools.literals import Nesting, as_json
from tgi_asgi.text.tools.odd_names import OddNames
from tgi_asgi.text.tools.parameters import Parameters

_BEFORE = re.compile(r"[\s\[,]*([\w.-]+)\(")
_IN_BEFORE = re.compile(r"[\s\[,]*[\w.-]*")
_MAX_HEAD = 256  # characters before a call's arguments; after each, all of them are matched again
_NAME = r"""[^\s=,()\[\]{}"'\\]([^=,()\[\]{}"'\\]*[^\s=,()\[\]{}"'\\])?"""  # of an argument
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:[0-7]{{1,3}}|x{_HEX}{{2}}|u{_HEX}{{4}}|U{_HEX}{{8}}|N\{{[\w -]+\}}|[^0-7xuUN])", re.DOTALL
)
_IN_ESCAPE = re.compile(rf"\\(?:[0-7]{{0,3}}|x{_HEX}?|u{_HEX}{{0,3}}|U{_HEX}{{0,7}}|N(?:\{{[\w -]{{0,80}})?)")
_PYTHON_ESCAPES = "'\n01234567xUNav"  # what may follow the backslash, and not in JSON


class PythonicCallParser(CallReader):
    """A parser that emits strings while they are written, other arguments once they are complete."""

    def __init__(self, tools: Sequence[ToolSpec], closers: Sequence[str]) -> None:
        super().__init__()
        self._closers = closers
        self._specs = {tool.name: tool for tool in tools}

    def finish(self) -> str:
        """Return the text that resembled a call but is none; nothing of a call that has begun."""
        if self._arguments is not None:
            return ""
        return self._held.strip(" ,\n") if self._has_called else self._held

    def _read_head(self, pieces: list[Piece]) -> str:
        if len(self._held) > _MAX_HEAD:
            self._give_up()
        elif found := _BEFORE.fullmatch(self._held):
            if found[1] in self._specs:
                arguments = PythonicArguments(self._specs[found[1]].arguments)
                self._begin_call(found[1], arguments, pieces)
            else:
                self._give_up()
        elif self._has_called and any(each.startswith(self._held.strip()) for each in self._closers):
            if self._held.strip() in self._closers:
                return self._skip(len(self._held), may_be_text=False)
        elif not _IN_BEFORE.fullmatch(self._held):
            self._give_up()
        return ""

    def _give_up(self) -> None:
        if self._has_called:
            self._held = self._held.lstrip(",")
        super()._give_up()


class PythonicArguments:
    """The arguments of one call, `a=1, b="x")`, turned into a JSON object while they are written.

    Attributes:
        have_ended: Whether the closing bracket has been read.
    """

    def __init__(self, listed: Parameters) -> None:
        self.have_ended = False
        self._odd_names = OddNames(listed.names, _NAME, behind="=")
        self._begun_name = ""  # what has been read of one of these
        self._opening = "{"
        self._key = ""
        self._held: list[str] = []  # characters that are not yet written
        self._quote = ""  # of the string that is being read
        self._escape = ""
        self._out: list[str] = []
        self._read: Callable[[str, int], int]
        self._begin_key()

    def push(self, text: str) -> tuple[str, str]:
        """Return the JSON that is certain now, and what follows the call."""
        text, self._begun_name = self._begun_name + text, ""
        at = 0
        while at < len(text) and not self.have_ended:
            at = self._read(text, at)
        written, self._out = "".join(self._out), []
        return written, text[at:]

    # Each of these reads one element and returns where the text goes on.

    def _read_odd_name(self, text: str, at: int) -> int:
        rest = text[at:].lstrip()
        if self._odd_names.may_begin(rest):
            self._begun_name = rest
            return len(text)
        name = self._odd_names.match(rest)
        if name is None:
            self._read = self._read_key
            return at
        self._key = name
        self._read = self._read_value
        return len(text) - len(rest) + len(name) + 1

    def _read_key(self, text: str, at: int) -> int:
        character = text[at]
        depth = self._nesting.push(character)
        if depth < 0:
            self._end()
        elif depth == 0 and character == "=":
            self._key = "".join(self._held).strip()
            self._held.clear()
            self._read = self._read_value
        elif depth == 0 and character == ",":  # an argument without a key
            self._held.clear()
        else:
            self._held.append(character)
        return at + 1

    def _read_value(self, text: str, at: int) -> int:
        if text[at].isspace():
            return at + 1
        if text[at] in "\"'":
            self._quote = text[at]
            self._read = self._read_quotes
        else:
            self._read = self._read_expression
        return at

    def _read_quotes(self, text: str, at: int) -> int:
        """Read up to three quotes; three begin a string that is read like other expressions."""
        if text[at] == self._quote and len(self._held) < 2:
            self._held.append(self._quote)
            return at + 1
        num_quotes = len(self._held) + (text[at] == self._quote)
        if num_quotes == 3:
            self._held.clear()
            for _ in range(2):
                self._keep(self._quote)
            self._read = self._read_expression
            return at
        self._held.clear()
        self._write_key()
        self._out.append('"')
        self._read = self._read_text if num_quotes == 1 else self._read_behind
        return at

    def _read_text(self, text: str, at: int) -> int:
        ends = [end for mark in (self._quote, "\\") if (end := text.find(mark, at)) >= 0]
        end = min(ends, default=len(text))
        self._out.append(dumped(text[at:end])[1:-1])
        if end == len(text):
            return end
        if text[end] == "\\":
            self._escape = "\\"
            self._read = self._read_escape
        else:
            self._read = self._read_behind
        return end + 1

    def _read_escape(self, text: str, at: int) -> int:
        longer = self._escape + text[at]
        if _IN_ESCAPE.fullmatch(longer):
            self._escape = longer
            return at + 1
        self._read = self._read_text
        if _ESCAPE.fullmatch(longer):
            self._out.append(_unescaped(longer, self._quote))
            return at + 1
        self._out.append(_unescaped(self._escape, self._quote))
        return at

    def _read_behind(self, text: str, at: int) -> int:
        """Read what follows a string: only then is it known whether the quote was its end."""
        character = text[at]
        if character.isspace():
            self._held.append(character)
            return at + 1
        if character in ",)]}":
            self._out.append('"')
            self._held.clear()
            self._begin_key()
            if character != ",":
                self._end()
            return at + 1
        if character in "\"'":  # a further part of the string
            self._quote = character
            at += 1
        else:  # a quote in the string that is not escaped
            self._out.append(dumped(self._quote + "".join(self._held))[1:-1])
        self._held.clear()
        self._read = self._read_text
        return at

    def _read_expression(self, text: str, at: int) -> int:
        depth = self._nesting.push(text[at])
        if depth > 0 or (depth == 0 and text[at] != ","):
            self._held.append(text[at])
            return at + 1
        value = "".join(self._held).strip()
        written = as_json(value)
        self._write_key()
        self._out.append(dumped(value) if written is None else written)
        self._held.clear()
        self._begin_key()
        if depth < 0:
            self._end()
        return at + 1

    def _keep(self, character: str) -> None:
        self._held.append(character)
        self._nesting.push(character)

    def _begin_key(self) -> None:
        self._nesting = Nesting()
        self._read = self._read_odd_name if self._odd_names.longest_first else self._read_key

    def _write_key(self) -> None:
        self._out.append(f"{self._opening or ', '}{dumped(self._key)}: ")
        self._opening = ""

    def _end(self) -> None:
        self._out.append(f"{self._opening}}}")
        self.have_ended = True


def _unescaped(escape: str, quote: str) -> str:
    """Return a character of a string as JSON writes it; an escape without a meaning is text, as in Python."""
    kind = escape[1:2]
    if _ESCAPE.fullmatch(escape):
        if kind in '"\\bfnrtu' or (kind == "/" and quote == '"'):  # as in JSON
            return escape
        if kind in _PYTHON_ESCAPES:
            with contextlib.suppress(SyntaxError):  # if there is no such character
                escape = ast.literal_eval(f'"{escape}"')
    return dumped(escape)[1:-1]
