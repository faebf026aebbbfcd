"""Mistral's `[TOOL_CALLS]`: before a list of calls, or since tokenizer v11 before each of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import (
    CallParser,
    Mark,
    alternatives,
    json_calls,
)
from tgi_asgi.text.tools.json_calls import JsonCallParser

_MARKER, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_HEAD = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*(\{\s*[\"}])")
_SHORT_IDS = re.compile(r"id\s*\|\s*length\s*!=\s*9")


class MistralFormat:
    """`[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, ...]`: tokenizers v3 and v7."""

    name = "mistral"
    marker = _MARKER
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = (_MARKER,)
    first = ""

    def recognises(self, template: str) -> bool:
        return self.marker in template and _ARGS not in template

    def begins(self, text: str) -> bool | None:
        return False  # the marker tells

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        more = ' (", " call)*' if is_parallel else ""
        return f'calls: " "? "[" call{more} "]"\n{json_calls(tools)}'

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return JsonCallParser(tools, openers=(self.marker, *self.openers), closers=("</tool_call>",))


class MistralArgsFormat:
    """`[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}`: tokenizers v11 and v13."""

    name = "mistral_args"
    marker = _MARKER
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = (_MARKER, _ARGS)
    first = ""

    def recognises(self, template: str) -> bool:
        return self.marker in template and _ARGS in template

    def begins(self, text: str) -> bool | None:
        return False  # the marker tells

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        more = f" ({mark(self.marker)} call)*" if is_parallel else ""
        calls = [f"{literal(tool.name)} {mark(_ARGS)} {tool.whole()}" for tool in tools]
        return f"calls: call{more}\n{alternatives('call', calls)}"

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return JsonCallParser(tools, openers=(self.marker,), head=_HEAD)


def shorten_ids(messages: Sequence[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return a history with ids of nine characters where the template refuses all others, as Mistral's do.

    OpenAI's clients send back the ids that they were given, which are longer.
    """
    if not _SHORT_IDS.search(template):
        return list(messages)
    result = []
    for message in messages:
        changed = dict(message)
        if changed.get("tool_call_id"):
            changed["tool_call_id"] = _short(changed["tool_call_id"])
        if changed.get("tool_calls"):
            changed["tool_calls"] = [
                {**call, "id": _short(call.get("id") or "")} for call in changed["tool_calls"]
            ]
        result.append(changed)
    return result


def _short(call_id: str) -> str:
    """Return an id of nine letters and digits: a given one unchanged, equal ones from equal ones."""
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=5).hexdigest()[:9]
