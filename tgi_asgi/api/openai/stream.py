"""OpenAI's stream chunks for both endpoints, put together from bytes that are prepared once a stream.

`orjson.dumps` of a whole chunk costs 0.6 us, of its text 0.1: a plain text chunk only pays for the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import orjson

from tgi_asgi.api.answer import LogprobsTracker
from tgi_asgi.api.call import Choices
from tgi_asgi.api.errors import NATIVE, OPENAI, error_event
from tgi_asgi.api.openai.choice import ChatChoice, finish_of
from tgi_asgi.api.openai.whole import Identity, chat_completion
from tgi_asgi.errors import TgiError
from tgi_asgi.types import FinishReason, TokenEvent

DONE = b"data: [DONE]\n\n"


class ChunkRenderer:
    """Renders one answer as `chat.completion.chunk` or `text_completion` events (`sse.Renderer`).

    Choice `index` is `part * n + event.index`, where `part` numbers the prompts. Several tokens of a choice
    that come together leave as one chunk.

    Args:
        identity: what every chunk says, and the options.
        is_chat: which of the two endpoints' shapes.
        trackers: one a choice where log-probabilities were asked for, else empty.
        choices: one a choice where answers have more than text, else empty.
        on_begin: called with each part's number before its first chunk.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        is_chat: bool,
        trackers: Sequence[LogprobsTracker] = (),
        choices: Sequence[ChatChoice] = (),
        on_begin: Callable[[int], None] | None = None,
    ) -> None:
        self._identity = identity
        self._n = identity.n
        self._trackers = trackers
        self._choices = choices
        self._num_choices = identity.n * len(identity.generation.jobs)
        self._num_generated = 0
        self._token_ids: list[list[int]] = [[] for _ in range(self._num_choices)]
        self._has_begun = [False] * len(identity.generation.jobs)
        self._on_begin = on_begin
        self._is_plain = not (trackers or choices or identity.shows_token_ids or identity.continuous_usage)
        shape: _ChatShape | _TextShape = _ChatShape(identity.is_compat) if is_chat else _TextShape()
        self._shape = shape
        envelope = orjson.dumps(identity.head(shape.object))
        self._head = b"data: " + envelope[:-1] + b',"choices":['
        shows_null_usage = identity.include_usage or identity.is_compat
        self._null_usage = b',"usage":null' if shows_null_usage else b""
        heads = [self._head + b'{"index":%d,' % index for index in range(self._num_choices)]
        self._text_heads = [head + shape.before_text for head in heads]
        self._choice_heads = heads
        self._text_tail = (
            shape.after_text + b',"logprobs":null,"finish_reason":null}]' + self._null_usage + b"}\n\n"
        )

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the chunks of new events."""
        if self._is_plain and self._has_begun[part] and len(events) == 1 and events[0].finish is None:
            event = events[0]
            self._num_generated += 1
            if not event.text:
                return b""
            return self._text_heads[part * self._n + event.index] + orjson.dumps(event.text) + self._text_tail
        frames: list[bytes] = []
        if not self._has_begun[part]:
            self._has_begun[part] = True
            self._begin(frames, part)
        by_choice: dict[int, list[TokenEvent]] = {}
        for event in events:
            by_choice.setdefault(part * self._identity.n + event.index, []).append(event)
        for index, of_choice in by_choice.items():
            self._choice(frames, index, of_choice)
        return b"".join(frames)

    def close(self) -> bytes:
        """Return the usage chunk, if it was asked for, and the end mark."""
        if not self._identity.include_usage:
            return DONE
        usage = orjson.dumps(self._identity.usage(self._num_generated))
        return self._head + b'],"usage":' + usage + b"}\n\n" + DONE

    def fail(self, error: TgiError) -> bytes:
        """Return the error as an event, and the end mark."""
        return error_event(error, NATIVE if self._identity.is_compat else OPENAI) + DONE

    def whole(self, parts: Sequence[Choices]) -> bytes:
        """Return the body of a chat that is not streamed."""
        return orjson.dumps(chat_completion(self._identity, parts[0], self._trackers, self._choices))

    def _begin(self, frames: list[bytes], part: int) -> None:
        """Open every choice of a part, in the order of their indices: accumulators fail on any other."""
        if self._on_begin is not None:
            self._on_begin(part)
        identity, shape = self._identity, self._shape
        prompt_ids = b""
        if identity.shows_token_ids:
            prompt_ids = b',"prompt_token_ids":' + orjson.dumps(identity.prompt_ids(part))
        echo = identity.echoes[part] if identity.echoes else ""
        for index in range(part * identity.n, (part + 1) * identity.n):
            if shape.is_chat:
                on_top = prompt_ids if index == 0 else b""
                frames.append(self._chunk(index, shape.opening, b"null", b"null", on_top=on_top))
                if echo:
                    frames.append(self._chunk(index, shape.text(echo), b"null", b"null"))
            elif echo or prompt_ids:
                frames.append(
                    self._chunk(index, shape.text(echo), self._take_logprobs(index), b"null", prompt_ids)
                )

    def _choice(self, frames: list[bytes], index: int, events: list[TokenEvent]) -> None:
        """Add the chunks of one choice's new events."""
        self._num_generated += len(events)
        last = events[-1]
        if not self._identity.hides_tokens:
            if self._identity.shows_token_ids:
                self._token_ids[index].extend(event.token_id for event in events)
            for body in self._bodies(index, events):
                extras = self._take_token_ids(index)
                frames.append(self._chunk(index, body, self._take_logprobs(index), b"null", extras))
        if last.finish is not None:
            hides = self._identity.hides_tokens
            reason = "length" if hides else self._finish_reason(index, last)
            stop = orjson.dumps(None if hides else last.stop)
            extras = b',"stop_reason":' + stop + self._take_token_ids(index)
            frames.append(
                self._chunk(
                    index, self._shape.text(""), self._take_logprobs(index), orjson.dumps(reason), extras
                )
            )

    def _chunk(
        self,
        index: int,
        body: bytes,
        logprobs: bytes,
        finish_reason: bytes,
        in_choice: bytes = b"",
        on_top: bytes = b"",
    ) -> bytes:
        usage = self._null_usage
        if self._identity.continuous_usage:
            usage = b',"usage":' + orjson.dumps(self._identity.usage(self._num_generated))
        return b"".join(
            (
                self._choice_heads[index],
                body,
                b',"logprobs":',
                logprobs,
                b',"finish_reason":',
                finish_reason,
                in_choice,
                b"}]",
                on_top,
                usage,
                b"}\n\n",
            )
        )

    def _take_logprobs(self, index: int) -> bytes:
        return orjson.dumps(self._trackers[index].take()) if self._trackers else b"null"

    def _take_token_ids(self, index: int) -> bytes:
        if not self._identity.shows_token_ids:
            return b""
        ids, self._token_ids[index] = self._token_ids[index], []
        return b',"token_ids":' + orjson.dumps(ids)

    def _bodies(self, index: int, events: Sequence[TokenEvent]) -> list[bytes]:
        """Return what is new in a choice, as the text or the deltas of as many chunks."""
        tracker = self._trackers[index] if self._trackers else None
        if self._choices:
            return self._choices[index].deltas(events, tracker)
        if tracker is not None:
            for event in events:
                tracker.push(event)
        text = "".join(event.text for event in events)
        return [self._shape.text(text)] if text else []

    def _finish_reason(self, index: int, event: TokenEvent) -> str:
        if self._choices:
            return self._choices[index].finish_reason(event)
        if self._identity.is_compat and not self._shape.is_chat and event.finish is FinishReason.STOP:
            return "stop_sequence"
        return finish_of(event)


class _ChatShape:
    """A choice of `chat.completion.chunk`."""

    object = "chat.completion.chunk"
    is_chat = True

    def __init__(self, is_compat: bool) -> None:
        # TGI's own client wants the role in every delta, and the key of the calls.
        role, calls = (b'"role":"assistant",', b',"tool_calls":null') if is_compat else (b"", b"")
        self.before_text = b'"delta":{' + role + b'"content":'
        self.after_text = calls + b"}"
        self.opening = b'"delta":{"role":"assistant","content":""' + self.after_text

    def text(self, text: str) -> bytes:
        return self.before_text + orjson.dumps(text) + self.after_text


class _TextShape:
    """A choice of a `text_completion` chunk; there is no role to open with."""

    object = "text_completion"
    is_chat = False
    before_text = b'"text":'
    after_text = b""
    opening = b""

    def text(self, text: str) -> bytes:
        return self.before_text + orjson.dumps(text)
