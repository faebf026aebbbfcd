"""The end of what has been read of an answer, which `AnswerParser` cannot show yet."""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi.text.tools.base import num_held


class HeldText:
    """Text that is held back as long as it may be the beginning of a marker.

        read so far    Let me see.\\n<tool_c
        shown          Let me see.
        held                      \\n<tool_c     `start` is 11

    Blanks before a marker are not shown, so they are held back as well.

    Attributes:
        text: What is held. If it is all blanks, further blanks are added only with what follows them.
    """

    __slots__ = ("_blanks", "_num_known", "_num_read", "_skipped", "_skips_blanks", "text")

    def __init__(self) -> None:
        self.text = ""
        self._blanks: list[str] = []  # that are not yet added
        self._num_read = 0  # characters so far
        self._num_known = 0  # leading characters in which no marker is searched
        self._skips_blanks = False
        self._skipped = ""  # the last blank that was skipped

    @property
    def start(self) -> int:
        """The offset of the text in everything read so far."""
        return self._num_read - len(self.text)

    def push(self, text: str) -> bool:
        """Append text that has been read; return whether it decides anything: blanks after blanks do not."""
        self._num_read += len(text)
        if text.isspace() and (self._blanks or self.text.isspace()):
            self._blanks.append(text)  # adding it and reading all again may take 0.3 ms
            return False
        self.add_blanks()
        self.text += text
        return True

    def add_blanks(self) -> None:
        """Add the blanks that are not yet part of the text."""
        if self._blanks:
            self.text = "".join((self.text, *self._blanks))
            self._blanks.clear()

    def take(self, size: int) -> str:
        """Remove the first `size` characters and return them."""
        taken, self.text = self.text[:size], self.text[size:]
        self._num_known = max(0, self._num_known - size)
        return taken

    def release(self, num_held: int) -> str:
        """Remove all but the last `num_held` characters and return them."""
        return self.take(len(self.text) - num_held)

    def put_back(self, text: str, *, num_known: int = 0) -> None:
        """Hold text that has been taken; no marker is searched in its first `num_known` characters."""
        self.text, self._num_known = text, num_known

    def drop_marker(self, marker: str) -> None:
        """Remove a marker, with which the text begins, and the blanks before it."""
        self.take(len(self.text) - len(self.text.lstrip()) + len(marker))

    def skip_blanks(self) -> None:
        """Note that another part has ended here: the blanks that come next are not text."""
        self._skips_blanks, self._skipped = True, ""

    def drop_skipped(self, *, keeps_last: bool) -> None:
        """Remove the blanks to skip, if any have come, but the last if it separates two texts."""
        if not self._skips_blanks:
            return
        text = self.text.lstrip("\n\r ")
        self._skipped = self.release(len(text))[-1:] or self._skipped
        self._skips_blanks = not text
        if text and keeps_last:
            self.text = self._skipped + text

    def find(self, markers: Sequence[str]) -> tuple[int, str] | None:
        """Return where the first marker is, and which it is."""
        found = [(at, each) for each in markers if (at := self.text.find(each, self._num_known)) >= 0]
        return min(found) if found else None

    def num_undecided(self, marker: str) -> int:
        """Return how many characters at the end may be the start of a marker, or blanks before it."""
        return num_held_with_blanks(self.text, marker, self._num_known)


def num_held_with_blanks(text: str, marker: str, num_known: int = 0) -> int:
    """Return how much of the end of `text` to hold: a possible start of the marker, and blanks before it.

    No marker starts in the first `num_known` characters.
    """
    size = num_held(text[num_known:], marker)
    shown = text[: len(text) - size]
    return size + len(shown) - len(shown.rstrip())
