"""What a whole answer may consist of, as one grammar: reasoning, then content or tool calls.

Calls are constrained from their marker on, or from the first character where an answer must be one; text
before a marker is free (`free.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import Mark, ToolFormat
from tgi_asgi.text.tools.reasoning import ReasoningStyle

_ANY = r"/(.|\n)*/"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which functions an answer may call, and how."""

    format: ToolFormat
    specs: Sequence[ToolSpec]
    must_call: bool = False
    is_parallel: bool = True  # several calls are allowed


def answer_grammar(
    content: GrammarSource | None,
    tools: ToolUse | None,
    reasoning: ReasoningStyle | None = None,
    *,
    is_reasoning_open: bool = False,
    mark: Mark = literal,
) -> GrammarSource | None:
    """Return the grammar of an answer; None if nothing constrains it.

    Args:
        content: constrains what is no call.
        reasoning: how a reasoning section, which is free, may come first; None if there is none.
        is_reasoning_open: the prompt has opened it.
        mark: how markers are written: some tokenizers have tokens of their own for them.

    Raises:
        InvalidRequest: a strict schema is too large, or cannot be enforced.
    """
    if content is None and tools is None:
        return None
    arguments = [ToolArguments(spec) for spec in tools.specs] if tools is not None else []
    body, rules = _body(content, tools, arguments, mark)
    is_free = content is None and tools is not None and not tools.must_call and tools.format.marker != ""
    free = (mark(tools.format.marker),) if tools is not None and is_free else ()
    start = ""
    if reasoning is not None:
        opening = "" if is_reasoning_open else mark(reasoning.start)
        optional = "" if is_reasoning_open else "?"
        rules.append("GAP: /[ \\n]+/")
        if mark(reasoning.end).startswith("<["):
            rules.append(f"reasoning: {opening} {_ANY} {mark(reasoning.end)} GAP?")
        else:
            rules += [
                f"reasoning: {opening} reasoning_text GAP?",
                f"reasoning_text[lazy]: {_ANY} {literal(reasoning.end)}",
            ]
        rules.append(f"body: {body}")
        body = f"reasoning{optional} body"
        start = opening
        free = (mark(reasoning.end), *free) if free or not start else ()
    named = (("answer", content.lark), *content.parts) if content is not None else ()
    ignored = set(content.ignored if content is not None else ()).union(*(each.ignored for each in arguments))
    lark = "\n".join([f"start: {body}", *rules])
    return GrammarSource(lark, named, tuple(sorted(ignored)), free, start)


def _body(
    content: GrammarSource | None, tools: ToolUse | None, arguments: Sequence[ToolArguments], mark: Mark
) -> tuple[str, list[str]]:
    """Return what follows the reasoning, and the rules that it needs."""
    if tools is None:
        return "@answer", []
    kind = tools.format
    marker = mark(kind.marker) if kind.marker else ""
    rules = [kind.rules(arguments, mark, is_parallel=tools.is_parallel)]
    if tools.must_call:
        return f"{marker} calls", rules
    if content is not None:
        return f"@answer | {marker} calls", rules
    if not marker:
        rules.append(f"PLAIN: /\\s*[^\\s\\{kind.first}](.|\\n)*/")
        return 'PLAIN | "" | calls', rules
    rules.append(f"TEXT: {_ANY}")
    if marker.startswith("<["):  # a special token ends text by itself
        return f"TEXT | TEXT {marker} calls", rules
    rules.append(f"opening[lazy]: {_ANY} {marker}")
    return "TEXT | opening calls", rules
