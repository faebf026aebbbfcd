"""The patterns by which `peft` gives single modules their own rank or alpha.

They are untrusted regular expressions, which could search for hours. Most are plain names, which are looked
up; the others must be few, short and unable to backtrack for long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from tgi_asgi.errors import ModelLoadError

_MAX_PATTERNS = 4096
_MAX_SEARCHES = 64
# Backtracking is bounded: an expression is tried at each part of a name (256 characters), and takes at most
# the square of the remaining length times the product of its alternatives.
_SEARCH = re.compile(r"(?:[\w.|^$()-]|\\[.d]|\[[\w-]+\]|[+*](?![+*?])){1,200}")
_MAX_REPEATS, _MAX_GROUPS, _MAX_ALTERNATIVES = 2, 3, 16
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.){1,256}")


class Patterns:
    """Values by pattern: that of the first pattern that matches a module's path, or its end after a dot.

        Patterns({"q_proj": 8, r"layers\\.\\d\\..*down_proj": 4}).find("model.layers.0.self_attn.q_proj", 16)

    Equals `peft.utils.get_pattern_key`, 0.21: `re.match(rf"(.*\\.)?({pattern})$", path)`, except that a dot
    in a plain name matches only a dot (in `peft`: any character).
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        """Compile the patterns.

        Raises:
            ModelLoadError: if they are too many, or one is damaged or might take long.
        """
        self._values = list(values.values())
        self._plain: dict[str, int] = {}
        self._searches: list[tuple[int, re.Pattern[str]]] = []
        if len(values) > _MAX_PATTERNS:
            raise ModelLoadError(f"there are {len(values)} patterns, {_MAX_PATTERNS} are read")
        for index, pattern in enumerate(values):
            if _PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern.replace("\\.", "."), index)
            else:
                self._searches.append((index, _compiled(pattern)))
        if len(self._searches) > _MAX_SEARCHES:
            raise ModelLoadError(
                f"there are {len(self._searches)} patterns that are not plain names; {_MAX_SEARCHES} are read"
            )

    def find(self, path: str, default: float) -> float:
        """Return a module's value."""
        found = [self._plain.get(f"^{path}", len(self._values))]
        found += [self._plain.get(path[start:], len(self._values)) for start in _starts(path)]
        first = min(found)
        for index, search in self._searches:
            if index > first:
                break
            if any(search.match(path, start) for start in _starts(path)):
                first = index
        return self._values[first] if first < len(self._values) else default


def _starts(path: str) -> Iterator[int]:
    yield 0
    yield from (match.end() for match in re.finditer(r"\.", path))


def _compiled(pattern: str) -> re.Pattern[str]:
    num_repeats = sum(map(pattern.count, "*+"))
    is_bounded = num_repeats <= _MAX_REPEATS and not re.search(r"\)[*+]", pattern)
    is_bounded &= pattern.count("(") <= _MAX_GROUPS and pattern.count("|") < _MAX_ALTERNATIVES
    if not is_bounded or not _SEARCH.fullmatch(pattern):
        raise ModelLoadError(f"a pattern that is not read: {pattern[:100]!r}")
    try:
        return re.compile(f"(?:{pattern})$")
    except re.error as error:
        raise ModelLoadError(f"a pattern that is damaged: {pattern[:100]!r} ({error})") from None
