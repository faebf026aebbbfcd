"""Join the user's successive messages for templates that want the turns to alternate (Gemma's, Mistral's).

Agents send several: a project's instructions, the state of their environment, and what the user wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tgi_asgi.text.chat.message import ChatMessage


def has_successive_users(messages: Sequence[ChatMessage]) -> bool:
    """Return whether a message of the user follows another one."""
    return any(one["role"] == next_one["role"] == "user" for one, next_one in pairwise(messages))


def accepts_successive_users(render: Callable[[list[ChatMessage]], str]) -> bool:
    """Return whether a template shows both of two successive messages of the user."""
    text = render([{"role": "user", "content": "PROBE-1"}, {"role": "user", "content": "PROBE-2"}])
    return "PROBE-1" in text and "PROBE-2" in text


def merge_successive_users(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages with each run of the user's merged into its first one."""
    merged: list[ChatMessage] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] == "user":
            content = _joined(merged[-1].get("content") or "", message.get("content") or "")
            merged[-1] = {**merged[-1], "content": content}
        else:
            merged.append(message)
    return merged


def _joined(first: str | list[Any], second: str | list[Any]) -> str | list[Any]:
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(text for text in (first, second) if text)
    return [*_parts(first), *_parts(second)]


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
