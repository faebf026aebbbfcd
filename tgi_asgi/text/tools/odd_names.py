"""Names of arguments that contain the marks which end a name, such as `q"`, `xlink:href` or `a=b`."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from itertools import islice

_MAX_NAMES = 256  # a match tries each of them


class OddNames:
    """The listed names that a format's own rule for names does not read as they are written.

    A parser looks for these before it applies the rule.

    Args:
        names: All arguments that a tool lists.
        usual: Regex of the names that the rule reads.
        before: Text before a name.
        behind: Text that ends a name.

    Attributes:
        longest_first: The first `_MAX_NAMES` of the listed names that the rule does not read.
    """

    def __init__(self, names: Iterable[str], usual: str, *, before: str = "", behind: str) -> None:
        odd = (name for name in names if not re.fullmatch(usual, name))
        self.longest_first = sorted(islice(odd, _MAX_NAMES), key=len, reverse=True)
        self._before, self._behind = before, behind
        self._heads = sorted(before + name + behind for name in self.longest_first)

    def match(self, text: str) -> str | None:
        """Return the longest name that a text begins with."""
        for name in self.longest_first:
            if text.startswith(self._before + name + self._behind):
                return name
        return None

    def may_begin(self, text: str) -> bool:
        """Return whether a text, which may still grow, is the beginning of a longer name."""
        next_head = bisect_right(self._heads, text)
        return next_head < len(self._heads) and self._heads[next_head].startswith(text)
