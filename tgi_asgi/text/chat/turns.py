"""Arrange turns for templates that want the user's and the assistant's to alternate (Gemma's, Mistral's).

Agents send several messages of the user in a row (a project's instructions, the state of their environment,
what the user wrote), reminders after the results of tools, and histories whose beginning they have cut off.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.text.chat.message import ChatMessage
from tgi_asgi.text.chat.probes import CALL, RESULT, USER, Probes

_ACKNOWLEDGED = "OK."  # between the result of a tool and the user's next message


class Turns:
    """Which orders of turns one template shows; it refuses others, or drops some of their messages."""

    def __init__(self, probes: Probes) -> None:
        user, answer, later = (
            {"role": role, "content": f"PROBE-{index}"}
            for index, role in enumerate(("user", "assistant", "user"))
        )
        second = {**answer, "content": "PROBE-3"}
        self._joined_roles: set[str] = set()  # whose messages may not follow each other
        if probes.loses(user, later, unlike=(user,)):
            self._joined_roles.add("user")
        if probes.loses(user, answer, second, USER, unlike=(user, answer, USER)):
            self._joined_roles.add("assistant")
        self._needs_user_first = probes.loses(answer, later, unlike=(user, answer, later))
        history = (user, CALL, RESULT)
        self._needs_answer = probes.loses(*history, later, unlike=history)

    def arranged(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """Return messages in an order that the template shows.

        user: a              user: a, b         joined
        user: b              assistant: call
        assistant: call      tool: result
        tool: result         assistant: OK.     added
        user: c              user: c
        """
        arranged: list[ChatMessage] = []
        for message in messages:
            role, last = message["role"], arranged[-1]["role"] if arranged else "system"
            if role == last and role in self._joined_roles:
                arranged[-1] = _joined(arranged[-1], message)
                continue
            if self._needs_user_first and role == "assistant" and last in ("system", "developer"):
                arranged.append({"role": "user", "content": ""})
            elif self._needs_answer and role == "user" and last == "tool":
                arranged.append({"role": "assistant", "content": _ACKNOWLEDGED})
            arranged.append(message)
        return arranged


def _joined(first: ChatMessage, second: ChatMessage) -> ChatMessage:
    """Return two messages of one role as one."""
    content = _joined_contents(first.get("content") or "", second.get("content") or "")
    joined = {**first, **second, "content": content}
    if calls := [*(first.get("tool_calls") or ()), *(second.get("tool_calls") or ())]:
        joined["tool_calls"] = calls
    return joined


def _joined_contents(first: str | list[Any], second: str | list[Any]) -> str | list[Any]:
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(text for text in (first, second) if text)
    return [*_parts(first), *_parts(second)]


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
