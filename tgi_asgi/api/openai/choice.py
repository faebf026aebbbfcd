"""One choice of an answer: events in, content of chunks or of the complete body out.

This is the only difference between chats and text completions; `render.py` adds what they share.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tgi_asgi.api.answer import ChoiceReader, LogprobsTracker, Reading
from tgi_asgi.api.custom_input import CustomInput
from tgi_asgi.api.job import ToolChoice
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent

Fields = dict[str, Any]  # fields of a choice


class TextChoice:
    """A choice of a text completion.

    Args:
        tracker: Collects its log-probabilities, if requested.
        echo: Text to put before its own.
        stop_word: Finish reason to report after a stop string.
        unfinished: Finish reason to report until there is one.
    """

    names = ("cmpl", "text_completion", "text_completion")  # prefix of ids, `object` of a body, of a chunk

    def __init__(
        self,
        tracker: LogprobsTracker | None = None,
        *,
        echo: str = "",
        stop_word: str = "stop",
        unfinished: str | None = None,
    ) -> None:
        self.tracker = tracker
        self.echo = echo
        self.unfinished = unfinished
        self.is_plain = tracker is None  # a chunk contains only its tokens' text
        self._words = {
            FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: stop_word,
        }  # fmt: skip

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of reasoning tokens so far."""
        return 0

    def text(self, text: str) -> Fields:
        """Return a chunk's fields for a text."""
        return {"text": text}

    def closing(self) -> Fields:
        """Return the last chunk's fields, without the finish reason."""
        return self.text("")

    def deltas(self, events: Sequence[TokenEvent]) -> list[Fields]:
        """Return the content of new events, each item for a separate chunk."""
        text = self._text_of(events)
        return [self.text(text)] if text else []

    def whole(self, events: Sequence[TokenEvent]) -> Fields:
        """Return the content of all events."""
        return {"text": self.echo + self._text_of(events)}

    def logprobs(self, *, is_whole: bool = False) -> Fields | None:
        """Return the log-probabilities that may be sent now; of a whole answer, also if it has none."""
        return self.tracker.take(is_whole=is_whole) if self.tracker is not None else None

    def finish_reason(self, event: TokenEvent) -> str:
        """Return OpenAI's finish reason for the choice."""
        assert event.finish is not None
        return self._words[event.finish]

    def _text_of(self, events: Sequence[TokenEvent]) -> str:
        if self.tracker is not None:
            for event in events:
                self.tracker.push(event)
        return "".join([event.text for event in events])


class ChatChoice(TextChoice):
    """A choice of a chat, which may also have reasoning and tool calls.

    Args:
        tools: The functions that may be called.
        is_alone: Whether the answer has no other choice.
        custom: Names of the tools whose calls have one string as input.
        is_function: Whether a call, of which there is one at most, is shown as a `function_call`.
    """

    names = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(
        self,
        reading: Reading | None,
        tracker: LogprobsTracker | None = None,
        *,
        echo: str = "",
        tools: ToolChoice | None = None,
        is_alone: bool = True,
        is_compat: bool = False,
        custom: Collection[str] = (),
        is_function: bool = False,
    ) -> None:
        super().__init__(tracker, echo=echo)
        self._call_field = "function_call" if is_function else "tool_calls"
        self._custom = custom
        self._input: CustomInput | None = None  # of the last call, if it is of a custom tool
        self.is_plain = reading is None and tracker is None
        self._reader = ChoiceReader(reading)
        self._is_named = tools is not None and tools.is_named
        # Before a call, the first chunk has no text, not even an empty one. So it waits for the second,
        # unless there are other choices: clients' accumulators need the first chunks in the choices' order.
        must_call = tools is not None and tools.must_call
        opens_before_call = tools is not None and not (must_call or is_compat or echo)
        self.opens_late = opens_before_call and is_alone
        is_undecided = opens_before_call and not is_alone
        self._opens_with = None if is_undecided or (must_call and not is_compat) else ""
        self._is_compat = is_compat
        # TGI's own client expects the role in every delta, and the `tool_calls` key.
        self._role: Fields = {"role": "assistant"} if is_compat else {}
        self._no_calls: Fields = {"tool_calls": None} if is_compat else {}
        self._calls: list[dict[str, Any]] = []

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of reasoning tokens so far."""
        return self._reader.num_reasoning_tokens

    def opening(self, then: Sequence[Fields] = ()) -> Fields:
        """Return the fields of the first chunk, given those of the next ones if it `opens_late`."""
        text = None if then and self._call_field in then[0]["delta"] else self._opens_with
        return {"delta": {"role": "assistant", "content": text, **self._no_calls}}

    def text(self, text: str) -> Fields:
        """Return a chunk's fields for a text."""
        return {"delta": {**self._role, "content": text, **self._no_calls}}

    def closing(self) -> Fields:
        """Return the last chunk's fields, without the finish reason; after a call no text, as OpenAI does."""
        return {"delta": {}} if self._calls and not self._is_compat else self.text("")

    def deltas(self, events: Sequence[TokenEvent]) -> list[Fields]:
        """Return the content of new events, each item for a separate chunk."""
        pieces = self._reader.push(events, self.tracker)
        made = [fields for piece in pieces for fields in self._deltas(piece)]
        return made if events[-1].finish is None else [*made, *self._more_of_call(self._rest_of_call())]

    def whole(self, events: Sequence[TokenEvent]) -> Fields:
        """Return the content of all events."""
        message = self.message(events)
        if self.echo:
            message["content"] = self.echo + (message.get("content") or "")
        return {"message": message}

    def message(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Return a complete answer as an assistant message."""
        pieces = self._reader.push(events, self.tracker)
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        for piece in pieces:
            if isinstance(piece, CallStart):
                self._add(self._rest_of_call())
                self._start(piece)
            elif isinstance(piece, CallArguments):
                self._add(self._given(piece.text))
        self._add(self._rest_of_call())
        if self._is_compat and self._calls:
            for call in self._calls:
                call["function"] = {"description": None, **call["function"]}
            return {"role": "assistant", "tool_calls": self._calls}
        has_text = bool(content) or not (self._calls or self._reader.is_reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content if has_text else None}
        message["refusal"] = None
        if self._calls:
            is_function = self._call_field == "function_call"
            message[self._call_field] = self._calls[0]["function"] if is_function else self._calls
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        return message

    def finish_reason(self, event: TokenEvent) -> str:
        """Return OpenAI's finish reason for the choice."""
        is_call = self._calls and event.finish is FinishReason.EOS
        is_reported = is_call and not (self._is_named or self._is_compat)
        return self._call_field if is_reported else super().finish_reason(event)

    def _deltas(self, piece: Piece) -> Iterator[Fields]:
        if isinstance(piece, Content):
            yield self.text(piece.text)
        elif isinstance(piece, Reasoning):
            yield {"delta": {**self._role, "reasoning_content": piece.text, "reasoning": piece.text}}
        elif isinstance(piece, CallStart):
            yield from self._more_of_call(self._rest_of_call())
            yield self._call_delta(self._start(piece))
        else:
            yield from self._more_of_call(self._given(piece.text))

    def _more_of_call(self, text: str) -> Iterator[Fields]:
        """Yield the delta that adds a text to the last call's arguments or input, if there is any."""
        if not text:
            return
        kind, field = self._call_form()
        call: dict[str, Any] = {kind: {field: text}}
        if self._is_compat:  # TGI repeats everything except the name
            call = {"id": self._calls[-1]["id"], "type": kind, kind: {"name": None, field: text}}
        yield self._call_delta(call)

    def _call_delta(self, call: dict[str, Any]) -> Fields:
        if self._call_field == "function_call":
            return {"delta": {"function_call": call["function"]} if len(self._calls) == 1 else {}}
        return {"delta": {**self._role, "tool_calls": [{"index": len(self._calls) - 1, **call}]}}

    def _start(self, piece: CallStart) -> dict[str, Any]:
        call_id = "0" if self._is_compat else f"call_{secrets.token_hex(12)}"
        kind = "custom" if piece.name in self._custom else "function"
        self._calls.append({"id": call_id, "type": kind})
        self._input = CustomInput() if kind == "custom" else None
        kind, field = self._call_form()
        self._calls[-1][kind] = {"name": piece.name, field: ""}
        return self._calls[-1]

    def _call_form(self) -> tuple[str, str]:
        """Return the type of the last call, and the field that has its arguments or input."""
        kind = self._calls[-1]["type"]
        return kind, "input" if kind == "custom" else "arguments"

    def _given(self, arguments: str) -> str:
        """Return what new arguments add to the last call: themselves, or the input that they stand for."""
        return arguments if self._input is None else self._input.push(arguments)

    def _rest_of_call(self) -> str:
        """End the last call; return its input if that could not be read while the arguments came."""
        text = "" if self._input is None else self._input.finish()
        self._input = None
        return text

    def _add(self, text: str) -> None:
        if text:
            kind, field = self._call_form()
            self._calls[-1][kind][field] += text


class WholeCallsChoice(ChatChoice):
    """A choice of a chat whose stream has each call in one delta, as Mistral's own streams do.

    Mistral's clients fail on a delta of a call without its name, or take it for another call.
    """

    _is_open = False  # whether the last call has not been sent

    def deltas(self, events: Sequence[TokenEvent]) -> list[Fields]:
        """Return the content of new events, each item for a separate chunk."""
        made: list[Fields] = []
        for piece in self._reader.push(events, self.tracker):
            if isinstance(piece, CallArguments):
                self._add(self._given(piece.text))
                continue
            made += self._ended_call()
            if isinstance(piece, CallStart):
                self._start(piece)
                self._is_open = True
            else:
                made += self._deltas(piece)
        return made if events[-1].finish is None else [*made, *self._ended_call()]

    def _ended_call(self) -> list[Fields]:
        if not self._is_open:
            return []
        self._add(self._rest_of_call())
        self._is_open = False
        return [self._call_delta(self._calls[-1])]
