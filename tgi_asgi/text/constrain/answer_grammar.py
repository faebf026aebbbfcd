"""The grammar of a whole answer: reasoning, then content or tool calls.

Calls are constrained from their marker on, or from the first character if the answer must be a call; text
before a marker is free (`free_text.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgi_asgi.text.constrain.plain_strings import escaped
from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import Mark, ToolFormat, marked_expression
from tgi_asgi.text.tools.reasoning import ReasoningStyle, Wrapper

_ANY = r"/(.|\n)*/"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which functions an answer may call, and how."""

    format: ToolFormat
    specs: Sequence[ToolSpec]
    must_call: bool = False
    is_parallel: bool = True  # whether several calls are allowed


def answer_grammar(
    content: GrammarSource | None,
    tools: ToolUse | None,
    reasoning: ReasoningStyle | None = None,
    *,
    is_reasoning_open: bool = False,
    mark: Mark = literal,
    wrapper: Wrapper | None = None,
) -> GrammarSource | None:
    """Return the grammar of an answer; None if nothing constrains it.

    Args:
        content: Grammar of everything that is not a call.
        reasoning: Style of the reasoning section, which is free, that may come first; None if there is none.
        is_reasoning_open: Whether the prompt has opened the reasoning section.
        mark: Writes a marker as a grammar expression; some tokenizers have single tokens for markers.
        wrapper: Markers that may surround the text of the answer.

    Raises:
        InvalidRequest: if a strict schema is too large, or cannot be enforced.
    """
    if content is None and tools is None:
        return None
    arguments = [ToolArguments(spec) for spec in tools.specs] if tools is not None else []
    begin, end = _wrapped(wrapper, mark)
    body, rules = _body(content, tools, arguments, mark, begin, end)
    opening = ending = ""
    early: list[str] = []
    if reasoning is not None:
        opening = "" if is_reasoning_open else marked_expression(reasoning.start, mark, reasoning.all_markers)
        ending = marked_expression(reasoning.end, mark, reasoning.all_markers)
        rules.append("GAP: /[ \\n]+/")
        if ending.startswith("<["):
            rules.append(f"reasoning: {opening} {_ANY} {ending} GAP?")
        else:
            rules += [
                f"reasoning: {opening} reasoning_text GAP?",
                f"reasoning_text[lazy]: {_ANY} {literal(reasoning.end)}",
            ]
        rules.append(f"body: {body}")
        body = f"reasoning{'' if is_reasoning_open else '?'} body"
        early = _early_call(tools, mark, opening)
        rules += early
        body += " | early" if early else ""
    calls = tools if content is None else None
    free, start = _free_text(calls, mark, opening, ending, has_marked_wrapper="<[" in begin + end)
    wakers = (marked_expression(tools.format.marker, mark, tools.format.markers),) if tools and early else ()
    named = (("answer", content.lark), *content.parts) if content is not None else ()
    ignored = set(content.ignored if content is not None else ()).union(*(each.ignored for each in arguments))
    lark = "\n".join([f"start: {body}", *rules])
    return GrammarSource(lark, named, tuple(sorted(ignored)), free, start, wakers)


def _early_call(tools: ToolUse | None, mark: Mark, opening: str) -> list[str]:
    """Return the rules of reasoning that ends with the beginning of a call; none if there may be no such."""
    follows = tools.format.leaves_reasoning(mark) if tools is not None else None
    if tools is None or follows is None:
        return []
    if not follows:
        return [f"early: {opening} {_ANY} {mark(tools.format.marker)} calls"]
    blanks = r"[ \t\n]*"
    start = escaped(tools.format.marker) + "".join(blanks + escaped(each) for each in follows)
    return [f"early: {opening} early_text begun", f"early_text[lazy]: /(.|\\n)*{start}/"]


def _wrapped(wrapper: Wrapper | None, mark: Mark) -> tuple[str, str]:
    """Return the expressions that may precede and follow the answer's text; "" for nothing."""
    if wrapper is None:
        return "", ""
    starts = [marked_expression(start, mark, wrapper.markers) for start in wrapper.start]
    begin = f'(({" | ".join(starts)}) "\\n"?)?' if starts else ""
    return begin, f'("\\n"? {marked_expression(wrapper.end, mark, wrapper.markers)})?' if wrapper.end else ""


def _from_token(expression: str) -> str:
    """Return a marker from its first special token on; anything before that counts as text."""
    return expression[expression.index("<[") :] if "<[" in expression else expression


def _free_text(
    tools: ToolUse | None, mark: Mark, opening: str, ending: str, *, has_marked_wrapper: bool
) -> tuple[tuple[str, ...], str]:
    """Return `GrammarSource.free` and `opening` of an answer, whose text is free if it may have tools' calls.

    Args:
        opening, ending: Marks of the reasoning; empty if there is none, or if it is already open.
        has_marked_wrapper: Whether tokens wrap the answer's text: they are not part of it, and no single
            token separates them from it.
    """
    if has_marked_wrapper or " <[" in ending:  # free text must end at a single token
        return (), ""
    free: tuple[str, ...] = ()
    if tools is not None and not tools.must_call and tools.format.marker:
        free = (_from_token(marked_expression(tools.format.marker, mark, tools.format.markers)),)
    if ending and (free or not opening):
        free = (ending, *free)
    return free, opening


def _body(
    content: GrammarSource | None,
    tools: ToolUse | None,
    arguments: Sequence[ToolArguments],
    mark: Mark,
    begin: str,
    end: str,
) -> tuple[str, list[str]]:
    """Return the expression that follows the reasoning, and the rules that it needs."""
    answer = f"{begin} @answer {end}".strip()
    if tools is None:
        return answer, []
    kind = tools.format
    openings = kind.openings(each.name for each in arguments)
    if openings and content is None and not tools.must_call:
        text = f"PLAIN: /(.|\\n)+/ & ~/({'|'.join(openings)})(.|\\n)*/"
        return 'PLAIN | "" | calls', [kind.rules_beside_text(arguments, is_parallel=tools.is_parallel), text]
    marker = marked_expression(kind.marker, mark, kind.markers) if kind.marker else ""
    may_be_content = content is not None and not tools.must_call
    make_rules = kind.rules_beside_json if may_be_content else kind.rules
    rules = [make_rules(arguments, mark, is_parallel=tools.is_parallel)]
    calls = f"({marker})? calls" if marker and kind.may_begin else f"{marker} calls".strip()
    if tools.must_call:
        return calls, rules
    if content is not None:
        return f"{answer} | {calls}", rules
    rules.append(f"TEXT: {_ANY}")
    text = f"{begin} TEXT {end}" if "<[" in begin + end else "TEXT"  # otherwise both are text
    if not marker:
        return f"{text} | calls", rules
    if "<[" in marker:  # a special token ends text by itself
        return f"{text} | {text} {_from_token(marker)} calls", rules
    rules.append(f"opening[lazy]: {_ANY} {literal(kind.marker)}")
    return "TEXT | opening calls" + (" | calls" if kind.may_begin else ""), rules
