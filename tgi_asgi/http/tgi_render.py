"""Native answers from token events: whole ones as structs, streams as bytes ready to send.

Called by the native routes. Stream frames are put together from prebuilt bytes: one is made a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import orjson
from msgspec import UNSET, UnsetType

from tgi_asgi.errors import TgiError
from tgi_asgi.http.errors import Dialect, error_event
from tgi_asgi.http.tgi_schema import (
    BestOfSequence,
    Details,
    FinishReasonName,
    GenerateResponse,
    PrefillToken,
    StreamDetails,
    Token,
)
from tgi_asgi.http.tgi_validation import NativePlan
from tgi_asgi.types import FinishReason, GenerationRequest, RequestStats, TokenEvent

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


def render_prefill(
    request: GenerationRequest, stats: RequestStats, tokenizer: Tokenizer
) -> list[PrefillToken]:
    """Return the prompt's tokens with their log-probabilities; none unless the engine was asked for them."""
    if stats.prompt_logprobs is None:
        return []
    return [
        PrefillToken(id=token_id, text=token_text(tokenizer, token_id), logprob=logprob)
        for token_id, (logprob, _) in zip(request.prompt_ids, stats.prompt_logprobs, strict=True)
    ]


def pick_best(choices: Sequence[Events]) -> int:
    """Return the index of the choice with the highest mean log-probability, the first on ties."""
    return max(range(len(choices)), key=lambda index: _mean_logprob(choices[index]))


def render_whole(
    plan: NativePlan, choices: Sequence[Events], best: int, prefill: list[PrefillToken], tokenizer: Tokenizer
) -> GenerateResponse:
    """Build the whole answer; `choices[best]` is the one that counts."""
    winner = choices[best]
    text = plan.text_prefix + text_of(winner)
    if not plan.details:
        return GenerateResponse(generated_text=text)
    losers = [
        BestOfSequence(
            generated_text=plan.text_prefix + text_of(loser),
            finish_reason=_finish(loser),
            generated_tokens=len(loser),
            seed=plan.shown_seed(index),
            prefill=prefill,
            tokens=_tokens(tokenizer, loser),
            top_tokens=_all_top_tokens(plan, tokenizer, loser),
        )
        for index, loser in enumerate(choices)
        if index != best
    ]
    details = Details(
        finish_reason=_finish(winner),
        generated_tokens=len(winner),
        seed=plan.shown_seed(best),
        prefill=prefill,
        tokens=_tokens(tokenizer, winner),
        top_tokens=_all_top_tokens(plan, tokenizer, winner),
        best_of_sequences=losers or UNSET,
    )
    return GenerateResponse(generated_text=text, details=details)


def _all_top_tokens(plan: NativePlan, tokenizer: Tokenizer, events: Events) -> list[list[Token]] | UnsetType:
    return [_top_tokens(tokenizer, event) for event in events] if plan.top_n else UNSET


class StreamRenderer:
    """Turns one stream's events into frames; holds its text for the last one."""

    __slots__ = ("_input_length", "_num_tokens", "_plan", "_texts", "_tokenizer")

    def __init__(self, plan: NativePlan, input_length: int, tokenizer: Tokenizer) -> None:
        self._plan = plan
        self._input_length = input_length
        self._tokenizer = tokenizer
        self._num_tokens = 0
        self._texts: list[str] = []

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return one whole SSE event a token; a native stream has one part."""
        return b"".join([self._frame(event) for event in events])

    def close(self) -> bytes:
        """Return nothing: the last token's event is the end, there is no `[DONE]`."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the event that ends a failed stream."""
        return error_event(error, Dialect.NATIVE)

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
        if self._plan.top_n:
            head += b',"top_tokens":' + _encode(_top_tokens(self._tokenizer, event))
        if event.finish is None:
            return head + b',"generated_text":null,"details":null}\n\n'
        return head + b',"generated_text":%b,"details":%b}\n\n' % self._ending(event.finish)

    def _ending(self, finish: FinishReason) -> tuple[bytes, bytes]:
        text = orjson.dumps(self._plan.text_prefix + "".join(self._texts))
        if not self._plan.details:
            return text, b"null"
        details = StreamDetails(
            finish_reason=FINISH_NAMES[finish],
            generated_tokens=self._num_tokens,
            seed=self._plan.shown_seed(),
            input_length=self._input_length,
        )
        return text, _encode(details)
