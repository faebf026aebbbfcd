"""Calls in a conversation's history, in a form that the chat template shows."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tgi_asgi.text.chat.message import ChatMessage
from tgi_asgi.text.surrogates import parsed
from tgi_asgi.text.tools.base import ToolFormat

_SHORT_IDS = re.compile(r"id\s*\|\s*length\s*!=\s*9")
_NAMED_IDS = "<|tool_call_argument_begin|>"


def with_calls_in_text(
    messages: Sequence[ChatMessage], form: ToolFormat, is_shown: Callable[[ChatMessage], bool]
) -> list[ChatMessage]:
    """Return messages in which calls that a template drops are text, as the model writes them.

    The templates of LFM2, Granite 3.3 and Phi-4-mini show no calls, and DeepSeek R1's none beside text.

    Args:
        is_shown: Whether the template shows the calls of a message.
    """
    result = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls and not is_shown(message):
            written = form.written([_named(call) for call in calls])
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = _joined(message.get("content"), written)
        result.append(message)
    return result


def with_results_in_order(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages in which the results of calls come in the order of the calls.

        assistant: f, g       assistant: f, g
        tool: result of g     tool: result of f
        tool: result of f     tool: result of g

    Clients that run calls at the same time may send results as they end; most templates show no ids. Results
    stay as they are if one of them names no call.
    """
    result: list[ChatMessage] = []
    places: dict[str | None, int] = {}  # of the last message's calls, by id
    for is_result, some in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        group = [*some]
        if not is_result:
            places = {call.get("id"): i for i, call in enumerate(group[-1].get("tool_calls") or ())}
        elif all(message.get("tool_call_id") in places for message in group):
            group.sort(key=lambda message: places[message.get("tool_call_id")])
        result += group
    return result


def with_single_calls(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages with at most one call each, which its result follows.

        assistant: f, g       assistant: f
        tool: result of f     tool: result of f
        tool: result of g     assistant: g
                              tool: result of g

    Llama 3's templates refuse several calls, and gpt-oss's and GigaChat 3's show only the first.
    """
    result: list[ChatMessage] = []
    waiting = deque(messages)
    while waiting:
        message = waiting.popleft()
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            result.append(message)
            continue
        answers: dict[str | None, list[ChatMessage]] = {}  # by the call's id
        while waiting and waiting[0]["role"] == "tool":
            answers.setdefault(waiting[0].get("tool_call_id"), []).append(waiting.popleft())
        own = message  # text and reasoning came before the first call
        for call in calls:
            result.append({**own, "tool_calls": [call]})
            result += answers.pop(call.get("id"), ())
            own = {"role": message["role"], "content": None}
        result += itertools.chain(*answers.values())  # of no call
    return result


def with_fitting_ids(messages: Sequence[ChatMessage], template: str) -> list[ChatMessage]:
    """Return a history with the ids that the template needs, whichever the client has.

    Mistral's templates refuse ids of other than nine characters. Kimi K2's show a call by its id alone, as
    `functions.<name>:<number of the call in the conversation>`.
    """
    is_short = _SHORT_IDS.search(template) is not None
    if not is_short and _NAMED_IDS not in template:
        return list(messages)
    result = []
    renamed: dict[str, str] = {}  # of the calls so far: clients may use an id again in a later turn
    number = 0
    for message in messages:
        changed = dict(message)
        calls = []
        for call in changed.get("tool_calls") or ():
            given = call.get("id") or ""
            renamed[given] = _short(given) if is_short else f"functions.{call['function']['name']}:{number}"
            calls.append({**call, "id": renamed[given]})
            number += 1
        if calls:
            changed["tool_calls"] = calls
        if answered := changed.get("tool_call_id"):
            changed["tool_call_id"] = renamed.get(answered, _short(answered) if is_short else answered)
        result.append(changed)
    return result


def _named(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return a call's name and arguments; if these are not an object, there are none, as in templates."""
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = parsed(arguments)
    return function["name"], arguments if isinstance(arguments, Mapping) else {}


def _joined(content: Any, calls: str) -> Any:
    if isinstance(content, list):
        return [*content, {"type": "text", "text": f"\n{calls}"}]
    return f"{content}\n{calls}" if content else calls


def _short(call_id: str) -> str:
    """Return an id of nine letters and digits: the given id if it has that form, else a hash of it."""
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=5).hexdigest()[:9]
