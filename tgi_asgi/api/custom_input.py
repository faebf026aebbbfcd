"""The input of a custom tool, which is a string: the only argument of the call that the model writes."""

from __future__ import annotations

import json
import re

from tgi_asgi.api.tools import CUSTOM_INPUT, whole_arguments

_START = re.compile(rf'\s*\{{\s*"{CUSTOM_INPUT}"\s*:\s*"')
# Characters and complete escapes; the first half of a surrogate pair is complete with what follows it.
_COMPLETE = re.compile(
    r'(?:[^"\\]|\\(?:[^u]|u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|u[dD][89abAB][0-9a-fA-F]{2}(?=[^\\]|\\[^u]|\\u[0-9a-fA-F]{4})))*"
)


class CustomInput:
    """Reads the input from a call's arguments as they arrive.

    source = CustomInput()
    source.push('{"inp')        # ''
    source.push('ut": "a\\\\n')   # 'a' and a line feed
    source.push('b"}')          # 'b'
    source.finish()             # ''
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._has_begun = False
        self._has_ended = False

    def push(self, arguments: str) -> str:
        """Return the next part of the input."""
        if self._has_ended:
            return ""
        self._buffer += arguments
        if not self._has_begun:
            found = _START.match(self._buffer)
            if found is None:
                return ""
            self._has_begun, self._buffer = True, self._buffer[found.end() :]
        complete = _COMPLETE.match(self._buffer)
        assert complete is not None, "it matches the empty text"
        end = complete.end()
        self._has_ended = self._buffer[end : end + 1] == '"'
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return _unescaped(text)

    def finish(self) -> str:
        """Return the rest of the input at the end of the call: all of it if the arguments look different."""
        return "" if self._has_begun else _input_of(self._buffer)


def _unescaped(text: str) -> str:
    """Return the characters that a part of a JSON string stands for; U+FFFD for half a surrogate pair."""
    if "\\" not in text:
        return text
    try:
        value: str = json.loads(f'"{text}"', strict=False)
    except ValueError:  # an escape that JSON does not have
        return text
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _input_of(arguments: str) -> str:
    """Return the input in complete arguments, or these if they have none; nothing if they were cut off."""
    value = whole_arguments(arguments)
    if value is None:
        return ""
    text = value.get(CUSTOM_INPUT) if isinstance(value, dict) else value
    return text if isinstance(text, str) else arguments
