"""Arrange turns for templates that want the user's and the assistant's to alternate (Gemma's, Mistral's).

Agents send several messages of the user in a row (a project's instructions, the state of their environment,
what the user wrote), reminders after the results of tools, and histories whose beginning they have cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tgi_asgi.text.chat.message import ChatMessage
from tgi_asgi.text.chat.probes import CALL, RESULT, USER, Probes

_ACKNOWLEDGED = "OK."  # between the result of a tool and the user's next message


class Turns:
    """Which turns one template shows; it refuses others, or drops some of their messages."""

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
        empty = {**answer, "content": ""}
        self._drops_empty = probes.loses(user, empty, later, unlike=(user, answer, later))
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
        if self._drops_empty:
            messages = [each for each in messages if each["role"] != "assistant" or _has_content(each)]
        arranged: list[ChatMessage] = []
        for message in map(_joined, self._runs(messages)):
            role, last = message["role"], arranged[-1] if arranged else None
            if self._needs_user_first and role == "assistant" and _begins_after(last):
                arranged.append({"role": "user", "content": ""})
            elif self._needs_answer and role == "user" and _is_call_or_result(last):
                arranged.append({"role": "assistant", "content": _ACKNOWLEDGED})
            arranged.append(message)
        return arranged

    def _runs(self, messages: Sequence[ChatMessage]) -> Iterator[list[ChatMessage]]:
        """Yield messages in lists; each list becomes one message. A message with calls ends its list."""
        run: list[ChatMessage] = []
        for message in messages:
            role = message["role"]
            last = run[-1] if run else message
            if run and (role != last["role"] or role not in self._joined_roles or last.get("tool_calls")):
                yield run
                run = []
            run.append(message)
        if run:
            yield run


def _has_content(message: ChatMessage) -> bool:
    return bool(message.get("content") or message.get("tool_calls"))


def _begins_after(last: ChatMessage | None) -> bool:
    """Return whether a message is the first one after the instructions, if there are any."""
    return last is None or last["role"] in ("system", "developer")


def _is_call_or_result(message: ChatMessage | None) -> bool:
    return message is not None and (message["role"] == "tool" or bool(message.get("tool_calls")))


def _joined(run: Sequence[ChatMessage]) -> ChatMessage:
    """Return messages of one role as one."""
    if len(run) == 1:
        return run[0]
    contents = [each for message in run if (each := message.get("content"))]
    content: str | list[Any] = [part for each in contents for part in _parts(each)]
    if all(isinstance(each, str) for each in contents):
        content = "\n\n".join(contents)
    return {**{key: value for message in run for key, value in message.items()}, "content": content}


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
