"""Find stop strings in a growing text; called by the engine's delivery per token, so it must be cheap."""

from __future__ import annotations


class StopMatcher:
    """A search for stop strings across pushes that holds back only text that may start one.

        matcher = StopMatcher(("END",), include=False)
        matcher.push("one EN")  # "one "
        matcher.push("D two")   # "", and matcher.matched == "END"

    Of the matches that a push completes, the earliest start wins, then the longest. A push is a token, and
    the first token that completes a match ends the generation; matches that later text would complete do not
    count. With `include`, the text ends after the match and nothing is ever held back; without it, the text
    ends before the match.

    `matched` is the stop string found, or None; once it is set, no more text is released.
    """

    __slots__ = ("_by_first", "_first", "_held", "_include", "matched")

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._include = include
        self._by_first: dict[str, tuple[str, ...]] = {}  # longest first
        for stop in sorted(stops, key=len, reverse=True):
            self._by_first[stop[0]] = (*self._by_first.get(stop[0], ()), stop)
        self._first = frozenset(self._by_first)
        self._held = ""  # the longest suffix of the text so far that is a proper prefix of a stop string
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that may now be shown."""
        held = self._held
        # Most tokens contain no first character of a stop string and take 0.13 us; the others about 0.7 us.
        if not held and self._first.isdisjoint(text):
            return text if self.matched is None else ""
        if self.matched is not None:
            return ""
        window = held + text
        start = self._scan(window)
        if self.matched is None:
            self._held = window[start:]
            return text if self._include else window[:start]
        self._held = ""
        return window[len(held) : start + len(self.matched)] if self._include else window[:start]

    def flush(self) -> str:
        """Return the text held back: the text has ended, so it is not the start of a stop string."""
        held, self._held = self._held, ""
        return "" if self._include else held

    def _scan(self, window: str) -> int:
        """Return the start of the earliest match, and set `matched`; else that of the longest head."""
        head = size = len(window)
        for at, char in enumerate(window):
            stops = self._by_first.get(char)
            if stops is None:
                continue
            if window.startswith(stops, at):
                self.matched = next(stop for stop in stops if window.startswith(stop, at))
                return at
            if head == size and size - at < len(stops[0]):
                rest = window[at:]
                if any(stop.startswith(rest) for stop in stops):
                    head = at
        return head
