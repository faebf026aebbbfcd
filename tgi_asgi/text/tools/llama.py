"""Llama 3.1 to 3.3: an answer that is a call is one JSON object, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import CallParser, Mark, json_calls
from tgi_asgi.text.tools.json_calls import JsonCallParser

# What tells a call from other JSON, without blanks: what comes before the name, and after it.
_OPENING = '{"name":"'
_ARGUMENTS = (',"parameters":{', ',"arguments":{')


class LlamaFormat:
    """`{"name": "f", "parameters": {"a": 1}}`; several calls are separated by `; `."""

    name = "llama3_json"
    marker = ""
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    first = "{"

    def recognises(self, template: str) -> bool:
        return "<|python_tag|>" in template or '{"name": function name, "parameters"' in template

    def begins(self, text: str) -> bool | None:
        squeezed = "".join(text.split())
        if not squeezed.startswith(_OPENING):
            return None if _OPENING.startswith(squeezed) else False
        _, quote, rest = squeezed[len(_OPENING) :].partition('"')
        if not quote or any(head.startswith(rest) and head != rest for head in _ARGUMENTS):
            return None
        return rest.startswith(_ARGUMENTS)

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        more = ' ("; " call)*' if is_parallel else ""
        return f"calls: call{more}\n{json_calls(tools, 'parameters')}"

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return JsonCallParser(tools)
