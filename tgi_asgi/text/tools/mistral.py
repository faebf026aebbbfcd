"""Mistral's `[TOOL_CALLS]`, before a list of calls."""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi.text.tools.base import CallParser, JsonCallParser, Mark, ToolSpec, json_calls


class MistralFormat:
    """`[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, ...]`."""

    name = "mistral"
    marker = "[TOOL_CALLS]"
    markers: tuple[str, ...] = ("[TOOL_CALLS]",)
    first = ""

    def recognises(self, template: str) -> bool:
        return "[TOOL_CALLS]" in template

    def begins(self, text: str) -> bool | None:
        return False  # the marker tells

    def rules(self, tools: Sequence[ToolSpec], mark: Mark, *, is_parallel: bool) -> str:
        more = ' (", " call)*' if is_parallel else ""
        return f'calls: " "? "[" call{more} "]"\n{json_calls(tools)}'

    def parser(self) -> CallParser:
        return JsonCallParser()
