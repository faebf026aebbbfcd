"""Tools as text in messages, for chat templates that show none, or only calls, or those of a message.

For templates that show none, text and calls are as Hermes models were trained on
(docs/structured-outputs.md).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from tgi_asgi.text.chat.message import ChatMessage, ChatTool, message_text
from tgi_asgi.text.chat.system import with_text_before
from tgi_asgi.text.surrogates import dumped
from tgi_asgi.text.tools.formats import GENERIC
from tgi_asgi.text.tools.histories import with_calls_in_text

# Where a template looks for tools: in a message, or in the variable `tools`.
_IN_MESSAGE = re.compile(r"message(\[['\"]tools['\"]\]|\.tools\b)")
_AS_VARIABLE = re.compile(r"(?<![.\w'\"|])tools\b(?!['\"|])")


def _prompt(tools: Sequence[ChatTool]) -> str:
    """Return the system message's text about the tools."""
    lines = "\n".join(dumped(tool) for tool in tools)
    return (
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def spell_out(
    messages: Sequence[ChatMessage],
    tools: Sequence[ChatTool] | None,
    *,
    accepts_system: bool = True,
) -> list[ChatMessage]:
    """Return messages without tool calls and tool roles, and with the tools in the system message.

    Args:
        accepts_system: Whether the template shows a system message; if not, the first message has the tools.
    """
    result: list[ChatMessage] = []
    for is_answer, together in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
        if is_answer:
            answers = (f"<tool_response>\n{message_text(message)}\n</tool_response>" for message in together)
            result.append({"role": "user", "content": "\n".join(answers)})
        else:
            result += with_calls_in_text(list(together), GENERIC, lambda message: False)
    return _with_system_text(result, _prompt(tools), accepts_system) if tools else result


def with_listed_tools(
    messages: Sequence[ChatMessage], tools: Sequence[ChatTool], *, accepts_system: bool = True
) -> list[ChatMessage]:
    """Return messages with the tools in the system message, for templates that show only calls (DeepSeek R1).

    Such models write calls in a form of their own, so the text does not name one.
    """
    lines = "\n".join(dumped(tool.get("function", tool)) for tool in tools)
    text = f"## Tools\n\nYou can call these functions, of which each line describes one:\n\n{lines}"
    return _with_system_text(list(messages), text, accepts_system)


def _with_system_text(messages: list[ChatMessage], text: str, accepts_system: bool) -> list[ChatMessage]:
    """Return messages with a text at the end of the system message, or before the first message's text."""
    first = messages[0] if messages else {"role": ""}
    if first["role"] in ("system", "developer"):
        return [{**first, "content": f"{message_text(first)}\n\n{text}"}, *messages[1:]]
    if accepts_system or first["role"] != "user":
        return [{"role": "system" if accepts_system else "user", "content": text}, *messages]
    return [with_text_before(text, first), *messages[1:]]


def with_own_tools(
    messages: Sequence[ChatMessage], tools: Sequence[ChatTool] | None, template: str
) -> list[ChatMessage]:
    """Return messages with the tools in the system message, if the template reads them there (Phi-4-mini)."""
    if not tools or not _IN_MESSAGE.search(template) or _AS_VARIABLE.search(template):
        return list(messages)
    functions = dumped([tool.get("function", tool) for tool in tools])
    system = (
        messages[0] if messages and messages[0]["role"] == "system" else {"role": "system", "content": ""}
    )
    others = messages[1:] if messages and messages[0] is system else messages
    return [{**system, "tools": functions}, *others]


def add_tool_prompt(messages: Sequence[ChatMessage], prompt: str) -> list[ChatMessage]:
    """Return messages with TGI's `tool_prompt` appended to the last one's text, as TGI does."""
    *before, last = messages
    content, text = last.get("content") or "", f"\n---\n{prompt}"
    added = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*before, {**last, "content": added}]
