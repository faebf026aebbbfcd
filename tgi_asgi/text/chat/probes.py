"""Find out what a chat template shows, refuses or drops, by rendering conversations that contain known words.

    probes = Probes(render)
    probes.shows({"role": "system", "content": "PROBE"}, USER)  # whether the text contains the word

Templates do not say which messages they accept, and those that drop something raise no error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tgi_asgi.text.chat.form import MessageForm
from tgi_asgi.text.chat.message import ChatMessage, ChatTool

USER: ChatMessage = {"role": "user", "content": "hi"}
_WORDS = re.compile(r"PROBE-\d")
_FUNCTION = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
RESULT: ChatMessage = {"role": "tool", "tool_call_id": "call00000", "name": "f", "content": "ok"}
CALL: ChatMessage = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


class Render(Protocol):
    """Renders messages for probing."""

    def __call__(self, messages: Sequence[ChatMessage], tools: list[ChatTool] | None = None) -> str:
        """Return the prompt; "" if the template refuses the messages."""


class Probes:
    """The probes of one template.

    Attributes:
        form: How it takes messages.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        takes_objects = self._shows_call({"PROBE": 1}) or not self._shows_call('{"PROBE": 1}')
        self._arguments: object = {"PROBE": 1} if takes_objects else '{"PROBE": 1}'
        tolerates_none = self._tolerates_none()
        needs_none = tolerates_none and not self._shows_call_after("")
        self.form = MessageForm(takes_objects, tolerates_none, needs_none, self._takes_one_text())

    def shows(self, *messages: ChatMessage) -> bool:
        """Return whether the word PROBE in these messages is shown."""
        return "PROBE" in self._render(messages)

    def shows_all(self, *messages: ChatMessage) -> bool:
        """Return whether all words PROBE-0, PROBE-1, ... of these messages' contents are shown."""
        text = self._conversation(messages)
        words = {word for message in messages for word in _WORDS.findall(message["content"] or "")}
        return bool(text) and words <= set(_WORDS.findall(text))

    def loses(self, *messages: ChatMessage, unlike: Sequence[ChatMessage]) -> bool:
        """Return whether these messages are not all shown, although simpler ones are."""
        return self.shows_all(*unlike) and not self.shows_all(*messages)

    def shows_parts(self, role: str) -> bool:
        """Return whether all texts of a role's parts are shown, and not the list itself."""
        parts = [{"type": "text", "text": "FIRST"}, {"type": "text", "text": "SECOND"}]
        message: ChatMessage = {"role": role, "content": parts}
        if role == "tool":
            text = self._answer(self._arguments, after=[{**RESULT, **message}])
        else:
            before, after = [USER] * (role == "assistant"), [USER] * (role != "user")
            text = self._render([*before, message, *after])
        return "FIRST" in text and "SECOND" in text and "'text'" not in text and '"text"' not in text

    def shows_tools(self) -> bool:
        """Return whether the tools are shown, given as the variable `tools` or in the system message."""
        system = {"role": "system", "content": "hi", "tools": '[{"name": "PROBE"}]'}
        tools = [{"type": "function", "function": {**_FUNCTION, "name": "PROBE"}}]
        return any("PROBE" in self._render(messages, tools) for messages in ([system, USER], [USER]))

    def drops_call(self, *, has_text: bool) -> bool:
        """Return whether an answer is rendered, but not its call."""
        answer = {"role": "assistant", "content": "Let me see." if has_text else None}
        text = self._history({**answer, "tool_calls": [_call('{"PROBE": 1}')]}, RESULT)
        return bool(text) and "PROBE" not in text

    def takes_several_calls(self) -> bool:
        """Return whether two calls of one answer are shown, or neither if each is an answer of its own."""
        calls = [{**_call(f'{{"PROBE-{index}": 1}}'), "id": f"call0000{index}"} for index in range(2)]
        results = [{**RESULT, "tool_call_id": call["id"]} for call in calls]
        one, two = ({"role": "assistant", "content": None, "tool_calls": [call]} for call in calls)
        together = self._history({**one, "tool_calls": calls}, *results)
        apart = self._history(one, results[0], two, results[1])
        return "PROBE-1" in together or not all(f"PROBE-{index}" in apart for index in range(2))

    def _shows_call(self, arguments: object) -> bool:
        """Return whether a call with such arguments is shown."""
        return "PROBE" in self._answer(arguments)

    def _tolerates_none(self) -> bool:
        """Return whether the content of a call, also of an earlier one, may be None."""
        text = self._answer(self._arguments)
        if "PROBE" not in text or "None" in text:
            return False
        return self._shows_call_after(None) or not self._shows_call_after("")

    def _shows_call_after(self, content: str | None) -> bool:
        """Return whether a call beside such content is shown when its result and a question follow."""
        text = self._answer(self._arguments, content, after=[RESULT, USER])
        return "PROBE" in text and "None" not in text

    def _takes_one_text(self) -> bool:
        """Return whether a call with both text and reasoning before it is refused, as by gpt-oss's."""
        thoughts = {"thinking": "hm", "reasoning_content": "hm", "reasoning": "hm"}
        one, two = (self._answer(self._arguments, text, fields=thoughts) for text in ("", "Let me see."))
        return "PROBE" in one and not two

    def _answer(
        self,
        arguments: object,
        content: str | None = None,
        *,
        after: Sequence[ChatMessage] = (),
        fields: Mapping[str, str] | None = None,
    ) -> str:
        """Render a question, an answer with a call, and what follows."""
        answer = {"role": "assistant", "content": content, **(fields or {}), "tool_calls": [_call(arguments)]}
        return self._render([USER, answer, *after])

    def _history(self, *messages: ChatMessage) -> str:
        """Render a question and what follows, in a request with a tool or, if that fails, without."""
        return self._conversation([USER, *messages])

    def _conversation(self, messages: Sequence[ChatMessage]) -> str:
        """Render messages; in a request with a tool if they have calls, unless that fails."""
        chat = [self.form.prepared(message) for message in self.form.with_arguments(messages)]
        has_calls = any(message.get("tool_calls") for message in messages)
        tools = [{"type": "function", "function": _FUNCTION}] if has_calls else None
        return self._render(chat, tools) or self._render(chat)


def _call(arguments: object) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
