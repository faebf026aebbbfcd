"""The form in which a chat template takes messages: arguments of calls, contents beside calls, reasoning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.text.chat.message import ChatMessage
from tgi_asgi.text.surrogates import parsed

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class MessageForm:
    """What sets one template's messages apart.

    Attributes:
        takes_objects: Whether the arguments of calls are objects; otherwise they are joined with text.
        tolerates_none: Whether the content beside calls may be None.
        needs_none: Whether it must be, instead of "".
        takes_one_text: Whether a call may have either text or reasoning before it, not both (gpt-oss's).
    """

    takes_objects: bool
    tolerates_none: bool
    needs_none: bool
    takes_one_text: bool

    def with_arguments(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Return messages with the arguments of calls as objects or as JSON.

        Arguments that are not an object, such as those of a call that was cut off, become an empty one, so
        that the conversation can go on.
        """
        convert = _with_parsed_arguments if self.takes_objects else _with_text_arguments
        return [
            {**message, "tool_calls": [convert(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]

    def prepared(self, message: ChatMessage) -> ChatMessage:
        """Return a copy of a message, with its reasoning under all names that templates read."""
        message = dict(message)
        calls = message.get("tool_calls")
        if message.get("content") is None:
            message["content"] = None if calls and self.tolerates_none else ""
        elif calls and self.needs_none and message["content"] == "":
            message["content"] = None
        reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message}
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        content = message["content"]
        if calls and reasoning and content and isinstance(content, str) and self.takes_one_text:
            both = f"{reasoning}\n\n{content}"
            message |= {"thinking": both, "reasoning_content": both, "reasoning": both, "content": ""}
        return message


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), dict):
        return call
    try:
        arguments = parsed(function.get("arguments") or "{}")
    except (ValueError, TypeError, RecursionError):
        arguments = {}
    arguments = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": {**function, "arguments": arguments}}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    parsed_call = _with_parsed_arguments(call)
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    arguments = parsed_call["function"]["arguments"]
    if arguments and isinstance(function["arguments"], str):
        return call  # as it was written
    return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
