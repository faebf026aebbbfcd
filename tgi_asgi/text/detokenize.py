"""Token bytes to text, one push per token; called by the engine's delivery, knows nothing of tokenizers."""

from __future__ import annotations

from codecs import utf_8_decode


class Utf8Assembler:
    """An incremental decoder of a choice's bytes that never splits a character.

    However the bytes are cut, the pieces join to `data.decode("utf-8", "replace")`: each maximal part of an
    ill-formed sequence becomes one U+FFFD (Unicode 16, section 3.9, "U+FFFD Substitution of Maximal
    Subparts"), as soon as it can no longer become a character.
    """

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""  # the first bytes of a character, at most three

    def push(self, data: bytes) -> str:
        """Return the characters that `data` completes; keep the first bytes of an unfinished one."""
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        if used == len(data):
            self._pending = b""
            return text
        self._pending = data[used:]
        if len(self._pending) == 2 and b"\xed\xa0" <= self._pending <= b"\xed\xbf":
            text += self.flush()  # the head of a surrogate, for which Python's decoder would wait
        return text

    def flush(self) -> str:
        """Return the kept bytes as U+FFFD, as the text ended inside a character."""
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text
