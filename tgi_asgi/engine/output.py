"""Turn one choice's tokens into events: bytes, whole characters, stop strings, and the finish reason.

Called by the engine once per token, so it is kept short; knows neither the scheduler nor asyncio.
"""

from __future__ import annotations

from typing import Protocol

from tgi_asgi.runner.plan import Sampled
from tgi_asgi.text.detokenize import Utf8Assembler
from tgi_asgi.text.stop import StopMatcher
from tgi_asgi.types import FinishReason, StopConditions, TokenEvent


class TokenTable(Protocol):
    """The part of a tokenizer that the engine needs."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int, /) -> bytes:
        """Return the token's own bytes within running text."""


class ChoiceOutput:
    """A converter of a choice's tokens to events; the event that ends the choice has `finish` set.

    Precedence: the model's EOS and the request's stop ids, then stop strings, then the end of the grammar,
    then the length. An EOS or stop-id token contributes text only with `include_stop`.
    """

    __slots__ = (
        "_assembler", "_drops_space", "_eos_ids", "_index", "_matcher", "_num_tokens", "_scope", "_stop",
        "_tokenizer",
    )  # fmt: skip

    def __init__(
        self, index: int, stop: StopConditions, tokenizer: TokenTable, eos_ids: frozenset[int]
    ) -> None:
        self._index = index
        self._stop = stop
        self._tokenizer = tokenizer
        self._eos_ids = frozenset() if stop.ignore_eos else eos_ids
        self._drops_space = stop.drops_first_space
        self._assembler = Utf8Assembler()
        self._matcher = StopMatcher(stop.stop, stop.include_stop) if stop.stop else None
        self._scope = stop.reasoning.scope() if stop.stop and stop.reasoning is not None else None
        self._num_tokens = 0

    def push(self, sampled: Sampled) -> TokenEvent:
        """Return the event of the choice's next token."""
        stop, token_id, matcher = self._stop, sampled.token_id, self._matcher
        self._num_tokens += 1
        is_special = token_id in self._tokenizer.special_ids
        is_hidden = is_special and stop.skip_special_tokens and token_id not in stop.shown_special_ids
        data = b"" if is_hidden else self._tokenizer.token_bytes(token_id)
        if self._drops_space and data:
            data, self._drops_space = data.removeprefix(b" "), False
        event = TokenEvent(self._index, token_id, data, "", sampled.logprob, sampled.top, is_special)
        if token_id in self._eos_ids:
            event.finish = FinishReason.EOS
        elif token_id in stop.stop_token_ids:
            event.finish = FinishReason.STOP
            event.stop = token_id
        if event.finish is None or stop.include_stop:
            event.text = self._text(data)
        else:
            event.data = b""
        if event.finish is None:
            # "<|eot_id|>" as a stop string means the token, which is not in the text; it ends reasoning, too.
            if is_hidden and matcher is not None and self._num_tokens > stop.min_tokens:
                event.text += matcher.hide(self._tokenizer.token_bytes(token_id).decode("utf-8", "replace"))
            if matcher is not None and matcher.matched is not None:
                event.finish = FinishReason.STOP
                event.stop = matcher.matched
            elif sampled.is_last:
                event.finish = FinishReason.EOS
            elif self._num_tokens >= stop.max_tokens:
                event.finish = FinishReason.LENGTH
        if event.finish is not None:
            self._end(event)
        return event

    def _text(self, data: bytes) -> str:
        text = self._assembler.push(data)
        return text if self._matcher is None else self._search(self._matcher, text)

    def _search(self, matcher: StopMatcher, text: str, *, is_end: bool = False) -> str:
        """Search new text for stop strings; return the text that may now be shown."""
        before = ""
        if self._scope is not None:
            before, text = self._scope.push(text)
            if is_end:
                text += self._scope.flush()
            if before:  # content has ended, so what was held back is not the start of a stop string
                before = matcher.flush() + before
        if self._num_tokens > self._stop.min_tokens:
            text = matcher.push(text)
        return before + text

    def _end(self, event: TokenEvent) -> None:
        """Append the text that was held back, unless a stop string cut it off."""
        matcher = self._matcher
        tail = self._assembler.flush()
        if matcher is None:
            event.text += tail
        elif matcher.matched is None:
            event.text += self._search(matcher, tail, is_end=True)
            if matcher.matched is None:
                event.text += matcher.flush()
            elif event.finish is FinishReason.LENGTH:
                event.finish = FinishReason.STOP
                event.stop = matcher.matched
