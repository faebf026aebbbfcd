"""The part of `docs/generic.md` from `generic_table`; `python -m tests.support.generic_page` prints it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from tests.support import generic_table as table
from tests.support.architecture_table import NOT_BUILT, TYPES

_WIDTH = 118


def page() -> str:
    """Return the text."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    others = [name for name in TYPES if name not in table.NATIVE and name not in NOT_BUILT]
    by_tier = {tier: [name for name in others if table.tier_of(name) == tier] for tier in table.TIERS}
    num_served = len(TYPES) - len(NOT_BUILT) - len(by_tier["refused"])
    yield f"Of {len(TYPES)} architectures, {num_served} are served."
    yield from _paragraph("By a native family", list(table.NATIVE))
    yield from _paragraph("By the common shape", by_tier["common"])
    yield from _paragraph("By the code of transformers, on the server's kernels", by_tier["generic"])
    yield from _rows("One sequence at a time", table.SEQUENTIAL)
    yield from _rows("Refused before weights are read", table.REFUSED)
    yield from _rows("Not tried", NOT_BUILT)


def _paragraph(title: str, names: list[str]) -> Iterator[str]:
    yield from ("", f"### {title} ({len(names)})", "")
    yield from textwrap.wrap(", ".join(names), _WIDTH, break_on_hyphens=False)


def _rows(title: str, reasons: Mapping[str, str]) -> Iterator[str]:
    yield from ("", f"### {title} ({len(reasons)})", "", "| architectures | reason |", "|---|---|")
    named = {
        name: f'"{reason}": {table.WHY[name]}' if name in table.WHY else reason
        for name, reason in reasons.items()
    }
    for reason in dict.fromkeys(named.values()):
        yield f"| {', '.join(name for name in named if named[name] == reason)} | {reason} |"


if __name__ == "__main__":
    print(page())
