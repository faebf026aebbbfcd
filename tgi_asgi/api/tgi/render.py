"""Native answers from token events: whole ones as structs, streams as bytes ready to send.

Stream frames are put together from prebuilt bytes: one is made a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import orjson
from msgspec import UNSET, UnsetType

from tgi_asgi.api.call import Choices, Generation
from tgi_asgi.api.errors import NATIVE, error_event
from tgi_asgi.api.tgi.schema import (
    BestOfSequence,
    Details,
    FinishReasonName,
    GenerateResponse,
    PrefillToken,
    StreamDetails,
    Token,
)
from tgi_asgi.api.tgi.validation import Shown
from tgi_asgi.errors import TgiError
from tgi_asgi.types import FinishReason, TokenEvent

if TYPE_CHECKING:
    from tgi_asgi.text.tokenizer import Tokenizer

FINISH_NAMES: dict[FinishReason, FinishReasonName] = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
}
Events = Sequence[TokenEvent]  # of one choice

_encode = msgspec.json.encode


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text by itself, as for prompt and alternative tokens."""
    if token_id in tokenizer.special_ids:
        return tokenizer.token_text(token_id)
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _top_tokens(tokenizer: Tokenizer, event: TokenEvent) -> list[Token]:
    return [
        Token(
            id=token_id,
            text=token_text(tokenizer, token_id),
            logprob=logprob,
            special=token_id in tokenizer.special_ids,
        )
        for token_id, logprob in event.top or ()
    ]


def _tokens(tokenizer: Tokenizer, events: Events) -> list[Token]:
    return [
        Token(
            id=event.token_id,
            text=tokenizer.token_text(event.token_id) if event.is_special else event.text,
            logprob=event.logprob,
            special=event.is_special,
        )
        for event in events
    ]


def text_of(events: Events) -> str:
    """Return a choice's whole text."""
    return "".join([event.text for event in events])


def _finish(events: Events) -> FinishReasonName:
    finish = events[-1].finish
    assert finish is not None, "a choice ended without a finish reason"
    return FINISH_NAMES[finish]


def _mean_logprob(events: Events) -> float:
    known = [event.logprob for event in events if event.logprob is not None]
    return sum(known) / len(known) if known else -math.inf


def pick_best(choices: Sequence[Events]) -> int:
    """Return the index of the choice with the highest mean log-probability, the first on ties."""
    return max(range(len(choices)), key=lambda index: _mean_logprob(choices[index]))


class NativeRenderer:
    """Turns one request's events into a whole answer or into frames; holds a stream's text for its last one.

    Args:
        is_list: a whole answer is an array of one object, as on `POST /`.
    """

    __slots__ = ("_generation", "_is_list", "_num_tokens", "_shown", "_texts", "_tokenizer")

    def __init__(self, generation: Generation, shown: Shown, *, is_list: bool = False) -> None:
        self._generation = generation
        self._shown = shown
        self._is_list = is_list
        self._tokenizer = generation.served.tokenizer
        self._num_tokens = 0
        self._texts: list[str] = []

    def whole(self, parts: Sequence[Choices]) -> bytes:
        """Return the body; the likeliest of several sequences counts."""
        [choices] = parts
        best = pick_best(choices)
        self._generation.num_shown = len(choices[best])
        answer = GenerateResponse(generated_text=self._shown.text_prefix + text_of(choices[best]))
        if self._shown.details:
            prefill = self._prefill()
            losers = [
                BestOfSequence(
                    generated_text=self._shown.text_prefix + text_of(loser),
                    finish_reason=_finish(loser),
                    generated_tokens=len(loser),
                    seed=self._shown.seed(index),
                    prefill=prefill,
                    tokens=_tokens(self._tokenizer, loser),
                    top_tokens=self._all_top_tokens(loser),
                )
                for index, loser in enumerate(choices)
                if index != best
            ]
            winner = choices[best]
            details = Details(
                finish_reason=_finish(winner),
                generated_tokens=len(winner),
                seed=self._shown.seed(best),
                prefill=prefill,
                tokens=_tokens(self._tokenizer, winner),
                top_tokens=self._all_top_tokens(winner),
                best_of_sequences=losers or UNSET,
            )
            answer = msgspec.structs.replace(answer, details=details)
        return _encode([answer] if self._is_list else answer)

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return one whole SSE event a token; a native stream has one part."""
        return b"".join([self._frame(event) for event in events])

    def close(self) -> bytes:
        """Return nothing: the last token's event is the end, there is no `[DONE]`."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the event that ends a failed stream."""
        return error_event(error, NATIVE)

    def _prefill(self) -> list[PrefillToken]:
        """Return the prompt's tokens with their log-probabilities; none unless they were asked for."""
        [channel] = self._generation.channels
        logprobs = channel.stats.prompt_logprobs
        if logprobs is None:
            return []
        return [
            PrefillToken(id=token_id, text=token_text(self._tokenizer, token_id), logprob=logprob)
            for token_id, (logprob, _) in zip(channel.request.prompt_ids, logprobs, strict=True)
        ]

    def _all_top_tokens(self, events: Events) -> list[list[Token]] | UnsetType:
        return [_top_tokens(self._tokenizer, event) for event in events] if self._shown.top_n else UNSET

    def _frame(self, event: TokenEvent) -> bytes:
        self._num_tokens += 1
        text = event.text
        self._texts.append(text)
        if event.is_special:
            text, special = self._tokenizer.token_text(event.token_id), b"true"
        else:
            special = b"false"
        head = b'data: {"index":%d,"token":{"id":%d,"text":%b,"logprob":%b,"special":%b}' % (
            self._num_tokens,
            event.token_id,
            orjson.dumps(text),
            orjson.dumps(event.logprob),
            special,
        )
        if self._shown.top_n:
            head += b',"top_tokens":' + _encode(_top_tokens(self._tokenizer, event))
        if event.finish is None:
            return head + b',"generated_text":null,"details":null}\n\n'
        return head + b',"generated_text":%b,"details":%b}\n\n' % self._ending(event.finish)

    def _ending(self, finish: FinishReason) -> tuple[bytes, bytes]:
        text = orjson.dumps(self._shown.text_prefix + "".join(self._texts))
        if not self._shown.details:
            return text, b"null"
        details = StreamDetails(
            finish_reason=FINISH_NAMES[finish],
            generated_tokens=self._num_tokens,
            seed=self._shown.seed(),
            input_length=self._generation.num_prompt_tokens,
        )
        return text, _encode(details)
