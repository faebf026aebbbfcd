"""DeepSeek V3 and R1: calls between tokens of their own, arguments as a fenced block of JSON."""

# ruff: noqa: RUF001, RUF002  # the bars are DeepSeek's own

from __future__ import annotations

import re
from collections.abc import Sequence

from tgi_asgi.text.grammar_source import literal
from tgi_asgi.text.tools.base import CallParser, JsonCallParser, Mark, ToolSpec, alternatives

_BEGIN, _END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_CALLS_END = "<｜tool▁calls▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_HEAD = re.compile(f"{_SEPARATOR}([^\\n]+)\\n```json\\n(?=\\{{)")


class DeepSeekFormat:
    """`<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\\n```json\\n{...}\\n```...`."""

    name = "deepseek"
    marker = "<｜tool▁calls▁begin｜>"
    markers: tuple[str, ...] = (marker, _CALLS_END, _BEGIN, _END, _SEPARATOR)
    first = ""

    def recognises(self, template: str) -> bool:
        return _BEGIN in template

    def begins(self, text: str) -> bool | None:
        return False  # the marker tells

    def rules(self, tools: Sequence[ToolSpec], mark: Mark, *, is_parallel: bool) -> str:
        more = r' ("\n" call)*' if is_parallel else ""
        begin, end = f'{mark(_BEGIN)} "function" {mark(_SEPARATOR)}', mark(_END)
        calls = [
            rf'{begin} {literal(tool.name)} "\n```json\n" {tool.arguments()} "\n```" {end}' for tool in tools
        ]
        return f"calls: call{more} {mark(_CALLS_END)}\n{alternatives('call', calls)}"

    def parser(self) -> CallParser:
        return JsonCallParser(_HEAD)
