"""Merge scattered instructions for templates that accept them only once, at the front, or not at all.

Agents send several: a system prompt, a developer's, and reminders between the turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tgi_asgi.text.chat.message import ChatMessage, message_text

_PROBE = re.compile(r"PROBE-\d")
_ROLES = ("system", "developer")


def merge_system_messages(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages with all instructions merged into the first message, with the first one's role."""
    instructions = [message for message in messages if message["role"] in _ROLES]
    if not instructions:
        return list(messages)
    others = [message for message in messages if message["role"] not in _ROLES]
    texts = [text for message in instructions if (text := message_text(message))]
    return [{**instructions[0], "content": "\n\n".join(texts)}, *others]


def move_instructions(messages: Sequence[ChatMessage], *, is_last: bool = False) -> list[ChatMessage]:
    """Return messages with the instructions at the front moved into the user's next message.

    If another message follows, they become a message of the user.

    Args:
        is_last: Whether they move into the user's last message instead.
    """
    instructions, *others = messages
    places = [i for i, message in enumerate(others) if message["role"] == "user"]
    place = places[-1] if is_last and places else 0
    if others[place : place + 1] and others[place]["role"] == "user":
        others[place] = with_text_before(message_text(instructions), others[place])
    else:
        others.insert(0, {**instructions, "role": "user"})
    return others


def with_text_before(text: str, message: ChatMessage) -> ChatMessage:
    """Return a message with a paragraph before its content."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return {**message, "content": [{"type": "text", "text": f"{text}\n\n"}, *content]}
    return {**message, "content": f"{text}\n\n{content}"}


def is_scattered(messages: Sequence[ChatMessage]) -> bool:
    """Return whether there are several instructions, or one that does not come first."""
    return any(message["role"] in _ROLES for message in messages[1:])


def accepts_scattered(render: Callable[[list[ChatMessage]], str], *, has_developer: bool) -> bool:
    """Return whether a template shows instructions at any position; it may refuse or drop them."""
    second = "developer" if has_developer else "system"
    first, late = {"role": "system", "content": "PROBE-1"}, {"role": second, "content": "PROBE-2"}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    user = {"role": "user", "content": "PROBE-3"}
    chats = ([first, late, user], [first, *turns, late, user], [first, *turns, user, late])
    return all({"PROBE-1", "PROBE-2", "PROBE-3"} <= set(_PROBE.findall(render(chat))) for chat in chats)
