"""The input of a custom tool, which is a string: the only argument of the call that the model writes."""

from __future__ import annotations

import json
import re

from tgi_asgi.api.tools import CUSTOM_INPUT, whole_arguments

_START = re.compile(rf'\s*\{{\s*"{CUSTOM_INPUT}"\s*:\s*"')
_MAX_START = 256  # characters, most of them blanks
_HEX = "[0-9a-fA-F]"
_HIGH, _LOW = rf"\\u[dD][89abAB]{_HEX}{{2}}", rf"\\u[dD][c-fC-F]{_HEX}{{2}}"
# Characters and complete escapes. The first half of a surrogate pair is complete with what follows it, and
# `\u` without digits after it is not an escape.
_COMPLETE = re.compile(
    rf'(?:[^"\\]++|\\[^u]|{_HIGH}(?=[^\\]|\\[^u]|\\u{_HEX}{{4}}|\\u{_HEX}{{0,3}}[^0-9a-fA-F])'
    rf"|(?!{_HIGH})\\u{_HEX}{{4}}|\\u(?={_HEX}{{0,3}}[^0-9a-fA-F]))*+"
)
_ESCAPE = re.compile(rf"{_HIGH}{_LOW}|\\u{_HEX}{{4}}|\\.", re.DOTALL)
_SIMPLE = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", **{each: each for each in '"\\/'}}


class CustomInput:
    """Reads the input from a call's arguments as they arrive.

        source = CustomInput()
        source.push('{"inp')  # ''
        source.push('ut": "a')  # 'a'
        source.push('b"}')  # 'b'
        source.finish()  # ''

    What comes out does not depend on how the arguments are cut. An escape that JSON does not have (a path of
    Windows) stays as it is written.

    Attributes:
        has_ended: Whether the input's end has come.
    """

    def __init__(self) -> None:
        self._arguments: list[str] = []  # until the input begins
        self._num_characters = 0  # in them
        self._buffer = ""  # of the input, not returned yet
        self._has_begun = False
        self.has_ended = False

    def push(self, arguments: str) -> str:
        """Return the next part of the input."""
        if self.has_ended:
            return ""
        if not self._has_begun:
            self._arguments.append(arguments)
            if self._num_characters > _MAX_START:
                return ""
            self._num_characters += len(arguments)
            text = "".join(self._arguments)
            found = _START.match(text)
            if found is None:
                return ""
            self._has_begun, arguments = True, text[found.end() :]
        self._buffer += arguments
        complete = _COMPLETE.match(self._buffer)
        assert complete is not None, "it matches the empty text"
        end = complete.end()
        self.has_ended = self._buffer[end : end + 1] == '"'
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return _ESCAPE.sub(_character, text)

    def finish(self) -> str:
        """Return all of the input at the end of the call, if the arguments do not look as they should."""
        return "" if self._has_begun else _input_of("".join(self._arguments))


def _character(found: re.Match[str]) -> str:
    """Return what an escape stands for; U+FFFD for half a surrogate pair."""
    escape = found[0]
    if len(escape) == 2:
        return _SIMPLE.get(escape[1], escape)
    character: str = json.loads(f'"{escape}"')
    return "\ufffd" if "\ud800" <= character <= "\udfff" else character


def _input_of(arguments: str) -> str:
    """Return the input in complete arguments, or these if they have none; nothing if they were cut off."""
    value = whole_arguments(arguments)
    if value is None:
        return ""
    text = value.get(CUSTOM_INPUT) if isinstance(value, dict) else value
    return text if isinstance(text, str) else arguments
