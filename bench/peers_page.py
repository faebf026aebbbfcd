"""The results of `bench.peers` for docs/performance.md: the table in it, and the plot next to it.

    python -m bench.peers_page      # rewrites both from bench/results/peers.json

A test compares the page with the record.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.report import RESULTS

RECORD = RESULTS / "peers.json"
PAGE = RESULTS.parents[1] / "docs" / "performance.md"
PLOT = PAGE.with_suffix(".svg")
BEGIN, END = "<!-- table: python -m bench.peers_page -->", "<!-- end of the table -->"
# The record's figures that matter most to a reader, in words.
FIGURES = {
    "prompt of 512: TTFT, ms": "first token of a prompt of 512 tokens, ms",
    "decode x1: tokens/s": "decoding, one stream, tokens/s",
    "decode x16: tokens/s": "decoding, 16 streams, tokens/s",
    "16 clients: tokens/s": "16 clients, tokens/s",
    "16 clients: TTFT p50, ms": "16 clients, first token p50, ms",
    "16 clients: TTFT p99, ms": "16 clients, first token p99, ms",
    "16 clients: ITL p99, ms": "16 clients, gap between tokens p99, ms",
    "resident memory without the pool of keys and values, MiB": "memory without the KV pool, MiB",
    "start to /health, s": "start until healthy, s",
}
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7")
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 860, 290, 24, 64, 54
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


class Interval(NamedTuple):
    """A median with its 95 % interval."""

    median: float
    low: float
    high: float


class Row(NamedTuple):
    """One figure: its name, ours, and how many times better it is than each peer (above 1: better)."""

    words: str
    ours: float
    advantages: Mapping[str, Interval | None]


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """Return the figures of the record's first match, that of the default model."""
    match = record["matches"][0]
    peers = [name for name in match["contenders"] if name != "ours"]
    found = {each["figure"]: each for each in match["figures"]}
    return [
        Row(
            words,
            found[name]["median"]["ours"]["median"],
            {peer: _interval(found[name]["advantage"]["ours"].get(peer)) for peer in peers},
        )
        for name, words in FIGURES.items()
    ]


def _interval(given: Mapping[str, float] | None) -> Interval | None:
    return None if given is None else Interval(given["median"], given["low"], given["high"])


def table_of(rows: Sequence[Row]) -> str:
    """Format the figures as Markdown."""
    peers = list(rows[0].advantages)
    lines = [["", "ours", *(f"over {peer}" for peer in peers)], ["---"] * (len(peers) + 2)]
    for row in rows:
        cells = [row.advantages[peer] for peer in peers]
        lines.append([row.words, _number(row.ours), *(_cell(cell) for cell in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(value: Interval | None) -> str:
    if value is None:
        return ""
    digits = 2 if value.median < 1 else 1
    return f"{value.median:.{digits}f} ({value.low:.{digits}f}–{value.high:.{digits}f})"  # noqa: RUF001


def plot_of(rows: Sequence[Row], title: str) -> str:
    """Draw each ratio as a dot on its interval; the axis is logarithmic."""
    peers = list(rows[0].advantages)
    known = [cell for row in rows for cell in row.advantages.values() if cell is not None]
    low, high = min(cell.low for cell in known) / 1.2, max(cell.high for cell in known) * 1.2
    height = _TOP + _ROW * len(rows) + 40

    def place(value: float) -> float:
        share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'font-family="sans-serif" font-size="13"><title>{html.escape(title)}</title>',
        '<rect width="100%" height="100%" rx="6" fill="#fff"/>',
    ]
    for at, peer in enumerate(peers):
        x = 16 + at * (_WIDTH - 32) / len(peers)
        parts.append(f'<circle cx="{x + 5:.0f}" cy="24" r="5" fill="{_COLOURS[at]}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="28.5" fill="#222">over {html.escape(peer)}</text>')
    floor = _TOP + _ROW * len(rows)
    for tick in (tick for tick in _TICKS if low <= tick <= high):
        style = 'stroke="#222" stroke-width="1.5"' if tick == 1 else 'stroke="#ddd"'
        parts.append(f'<path d="M{place(tick):.1f} {_TOP - 10}V{floor}" {style}/>')
        parts.append(
            f'<text x="{place(tick):.1f}" y="{floor + 18}" text-anchor="middle" fill="#555">{tick:g}</text>'
        )
    end = _WIDTH - _RIGHT
    parts.append(
        f'<text x="{end}" y="{floor + 34}" text-anchor="end" fill="#555">ours is better: above 1</text>'
    )
    for index, row in enumerate(rows):
        middle = _TOP + _ROW * index + _ROW / 2 - 6
        parts.append(f'<text x="16" y="{middle + 4.5:.1f}" fill="#222">{html.escape(row.words)}</text>')
        for at, peer in enumerate(peers):
            if (cell := row.advantages[peer]) is None:
                continue
            y, colour = middle + (at - (len(peers) - 1) / 2) * 8, _COLOURS[at]
            line = f"M{place(cell.low):.1f} {y:.1f}H{place(cell.high):.1f}"
            parts.append(f'<path d="{line}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{place(cell.median):.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def page_with(text: str, table: str) -> str:
    """Put the table between the page's two marks."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def made() -> tuple[str, str]:
    """Return the expected page and plot."""
    rows = rows_of(json.loads(RECORD.read_text(encoding="utf-8")))
    return page_with(PAGE.read_text(encoding="utf-8"), table_of(rows)), plot_of(
        rows, "How many times better ours is, with 95 % intervals"
    )


def main() -> None:
    """Write both."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    for path, text in zip((PAGE, PLOT), made(), strict=True):
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
