"""The grammar of an answer in harmony's format: reasoning, then text or a call."""

from __future__ import annotations

from collections.abc import Sequence

from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import Mark, alternatives

_ANY = r"/(.|\n)*/"


def harmony_grammar(
    content: GrammarSource | None,
    specs: Sequence[ToolSpec] | None,
    mark: Mark = literal,
    *,
    must_call: bool = False,
    is_reasoning_open: bool = False,
) -> GrammarSource | None:
    """Return the grammar of an answer, as `answer_grammar` does; in this format a call ends the answer.

    `specs` are the tools that may be called, and None if the request has none.

    Raises:
        InvalidRequest: if a strict schema is too large, or cannot be enforced.
    """
    if content is None and specs is None:
        return None
    arguments = [ToolArguments(spec) for spec in specs or ()]
    channel, message, end = mark("<|channel|>"), mark("<|message|>"), mark("<|end|>")
    begins = f'{mark("<|start|>")} "assistant"'
    rules = [f'said: {channel} ("analysis" | "commentary") {message} said_text']
    if end.startswith("<["):
        rules += [f"said_text: SAID {end} {begins}", f"SAID: {_ANY}"]
    else:
        rules += [f"said_text: said_more {begins}", f"said_more[lazy]: {_ANY} {end}"]
    lasts = []
    if not must_call:
        lasts.append("final")
        rules.append(f'final: {channel} "final" {message} {"@answer" if content is not None else "FINAL"}')
        rules += [] if content is not None else [f"FINAL: {_ANY}"]
    if arguments:
        lasts.append("call")
        rules += _calls(arguments, channel, message, mark("<|constrain|>"))
    named = (("answer", content.lark), *content.parts) if content is not None and "final" in lasts else ()
    ignored = set(content.ignored if content is not None else ()).union(*(each.ignored for each in arguments))
    opened = "said_text " if is_reasoning_open else ""
    lark = "\n".join([f"start: {opened}said* last", alternatives("last", lasts), *rules])
    return GrammarSource(lark, named, tuple(sorted(ignored)))


def _calls(tools: Sequence[ToolArguments], channel: str, message: str, constrain: str) -> list[str]:
    """Return the rules of a call, whose recipient comes before or after the channel."""
    calls = []
    for tool in tools:
        name = literal(tool.name)
        header = f"(TO_EARLY {name} {channel} COMMENTARY | {channel} TO_LATE {name}) json_type"
        calls.append(f"{header} {message} {tool.whole()}")
    return [
        alternatives("call", calls),
        'TO_EARLY: " to=functions."',
        'COMMENTARY: "commentary"',
        'TO_LATE: "commentary to=functions."',
        f'json_type: (" json" | " "? {constrain} "json")?',  # directly after a name it would be part of that
    ]
