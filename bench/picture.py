"""Draw cumulative distributions as SVG: the share of values up to x, one curve per series, x logarithmic."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 420, 280, 48, 40, 44  # of one panel, in pixels
_MAX_POINTS = 200  # per curve


def draw(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, title: str, unit: str) -> None:
    """Write panels next to each other: name -> series -> values, which must be positive."""
    width = _WIDTH * len(panels)
    series = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    height = _HEIGHT + 22 * math.ceil(len(series) / 4)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(width / 2, 16, title, anchor="middle", size=13),
    ]
    for index, (name, panel) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({index * _WIDTH},0)">')
        parts += _panel(f"{name}, {unit}", panel, {label: series.index(label) for label in panel})
        parts.append("</g>")
    for index, label in enumerate(series):
        x, y = _LEFT + (index % 4) * (width - _LEFT) / 4, _HEIGHT + 12 + 22 * (index // 4)
        parts.append(f'<rect x="{x:.0f}" y="{y - 8:.0f}" width="14" height="4" fill="{_colour(index)}"/>')
        parts.append(_text(x + 20, y, label))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(name: str, panel: Mapping[str, Sequence[float]], colours: Mapping[str, int]) -> list[str]:
    values = [value for curve in panel.values() for value in curve]
    if not values:
        return [_text(_WIDTH / 2, _HEIGHT / 2, f"{name}: no values", anchor="middle")]
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = math.floor(low * 2) / 2, max(math.ceil(high * 2) / 2, math.floor(low * 2) / 2 + 0.5)
    right, floor = _WIDTH - 16, _HEIGHT - _BOTTOM

    def place(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / (high - low) * (right - _LEFT)

    parts = [_text((_LEFT + right) / 2, _HEIGHT - 10, name, anchor="middle")]
    for share in (0, 0.25, 0.5, 0.75, 0.9, 1):
        y = floor - share * (floor - _TOP)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{share:.0%}", anchor="end"))
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for value in (10**exponent, 3 * 10**exponent):
            if low <= math.log10(value) <= high:
                parts.append(f'<path d="M{place(value):.1f} {_TOP}V{floor}" stroke="#eee"/>')
                parts.append(_text(place(value), floor + 14, f"{value:g}", anchor="middle"))
    for label, curve in panel.items():
        if curve:
            parts.append(_curve(sorted(curve), place, floor, _colour(colours[label])))
    return parts


def _curve(values: Sequence[float], place: Callable[[float], float], floor: float, colour: str) -> str:
    step = max(len(values) // _MAX_POINTS, 1)
    points = [(value, (index + 1) / len(values)) for index, value in enumerate(values)]
    kept = [*points[::step], points[-1]]
    line = " ".join(f"{place(value):.1f},{floor - share * (floor - _TOP):.1f}" for value, share in kept)
    return f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'
    )


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
