"""`<tool_call>` around JSON: Hermes, Qwen 2.5 and 3, and every model that gets the generic tool prompt."""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import CallParser, Mark, json_calls
from tgi_asgi.text.tools.json_calls import JsonCallParser


class HermesFormat:
    """`<tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n</tool_call>`, once a call."""

    name = "hermes"
    marker = "<tool_call>"
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = ("<tool_call>", "</tool_call>")
    first = ""

    def recognises(self, template: str) -> bool:
        return "<tool_call>" in template and "<function=" not in template

    def begins(self, text: str) -> bool | None:
        return False  # the marker tells

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        end = mark("</tool_call>")
        more = rf' ("\n" {mark(self.marker)} "\n" call "\n" {end})*' if is_parallel else ""
        return rf'calls: "\n" call "\n" {end}{more}' + "\n" + json_calls(tools)

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return JsonCallParser(tools, openers=(self.marker,), closers=("</tool_call>",))
