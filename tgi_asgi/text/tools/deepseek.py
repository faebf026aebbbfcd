"""DeepSeek V3, R1 and V3.1: calls between tokens of their own; before V3.1 with a fenced block of JSON."""

# ruff: noqa: RUF001, RUF002  # the bars are DeepSeek's own

from __future__ import annotations

import re
from collections.abc import Sequence

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import CallParser, Mark, alternatives
from tgi_asgi.text.tools.json_calls import JsonCallParser

_BEGIN, _END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_CALLS_END = "<｜tool▁calls▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = "```json"
# With and without the kind and the fence, which both versions now forget and now write.
_HEAD = re.compile(
    f'(?:function{_SEPARATOR})?([\\w.-]+)\\s*(?:{_SEPARATOR})?\\s*(?:```(?:json)?\\s*)?(\\{{\\s*["}}])'
)


class DeepSeekFormat:
    """`<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\\n```json\\n{...}\\n```...`."""

    name = "deepseek"
    marker = "<｜tool▁calls▁begin｜>"
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = (marker, _CALLS_END, _BEGIN, _END, _SEPARATOR)
    first = ""

    def recognises(self, template: str) -> bool:
        return _BEGIN in template and _FENCE in template

    def begins(self, text: str) -> bool | None:
        return False  # the marker tells

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        begin, end = f'{mark(_BEGIN)} "function" {mark(_SEPARATOR)}', mark(_END)
        calls = [
            rf'{begin} {literal(tool.name)} "\n{_FENCE}\n" {tool.whole()} "\n```" {end}' for tool in tools
        ]
        return _calls(calls, r'"\n"', mark, is_parallel=is_parallel)

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return JsonCallParser(tools, openers=(_BEGIN,), closers=(_END, _CALLS_END), head=_HEAD)


class DeepSeekV31Format(DeepSeekFormat):
    """`<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...`."""

    name = "deepseek_v31"

    def recognises(self, template: str) -> bool:
        return _BEGIN in template and _FENCE not in template

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        calls = [
            f"{mark(_BEGIN)} {literal(tool.name)} {mark(_SEPARATOR)} {tool.whole()} {mark(_END)}"
            for tool in tools
        ]
        return _calls(calls, "", mark, is_parallel=is_parallel)


def _calls(calls: Sequence[str], between: str, mark: Mark, *, is_parallel: bool) -> str:
    more = f" ({between} call)*" if is_parallel else ""
    return f"calls: call{more} {mark(_CALLS_END)}\n{alternatives('call', calls)}"
