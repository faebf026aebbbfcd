"""Native answers from token events: whole ones as structs, streams as bytes ready to send.

Called by the native routes. Stream frames are put together from prebuilt bytes: one is made a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import orjson
from msgspec import UNSET

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


class CollectedSequence:
    """One choice of a whole answer, gathered from its events."""

    __slots__ = ("events", "finish", "text")

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.finish: FinishReasonName = "length"
        self.text = ""

    def add(self, event: TokenEvent) -> None:
        self.events.append(event)
        if event.finish is not None:
            self.finish = FINISH_NAMES[event.finish]
            self.text = "".join(event.text for event in self.events)

    @property
    def mean_logprob(self) -> float:
        known = [event.logprob for event in self.events if event.logprob is not None]
        return sum(known) / len(known) if known else float("-inf")

    def tokens(self, tokenizer: Tokenizer) -> list[Token]:
        return [
            Token(
                id=event.token_id,
                text=tokenizer.token_text(event.token_id) if event.is_special else event.text,
                logprob=event.logprob,
                special=event.is_special,
            )
            for event in self.events
        ]


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


def pick_best(sequences: Sequence[CollectedSequence]) -> int:
    """Return the index of the sequence with the highest mean log-probability, the first on ties."""
    return max(range(len(sequences)), key=lambda index: sequences[index].mean_logprob)


def render_whole(
    plan: NativePlan,
    sequences: Sequence[CollectedSequence],
    best: int,
    prefill: list[PrefillToken],
    tokenizer: Tokenizer,
) -> GenerateResponse:
    """Build the whole answer; `sequences[best]` is the one that counts."""
    winner = sequences[best]
    text = plan.text_prefix + winner.text
    if not plan.details:
        return GenerateResponse(generated_text=text)
    top = _all_top_tokens if plan.top_n else _no_top_tokens
    losers = [sequence for index, sequence in enumerate(sequences) if index != best]
    return GenerateResponse(
        generated_text=text,
        details=Details(
            finish_reason=winner.finish,
            generated_tokens=len(winner.events),
            seed=plan.shown_seed,
            prefill=prefill,
            tokens=winner.tokens(tokenizer),
            top_tokens=top(winner, tokenizer),
            best_of_sequences=[
                BestOfSequence(
                    generated_text=plan.text_prefix + loser.text,
                    finish_reason=loser.finish,
                    generated_tokens=len(loser.events),
                    seed=plan.shown_seed,
                    prefill=prefill,
                    tokens=loser.tokens(tokenizer),
                    top_tokens=top(loser, tokenizer),
                )
                for loser in losers
            ]
            or UNSET,
        ),
    )


def _all_top_tokens(sequence: CollectedSequence, tokenizer: Tokenizer) -> list[list[Token]]:
    return [_top_tokens(tokenizer, event) for event in sequence.events]


def _no_top_tokens(sequence: CollectedSequence, tokenizer: Tokenizer) -> msgspec.UnsetType:
    return UNSET


class StreamRenderer:
    """Turns one stream's events into frames; holds its text for the last one."""

    __slots__ = ("_input_length", "_num_tokens", "_plan", "_texts", "_tokenizer")

    def __init__(self, plan: NativePlan, input_length: int, tokenizer: Tokenizer) -> None:
        self._plan = plan
        self._input_length = input_length
        self._tokenizer = tokenizer
        self._num_tokens = 0
        self._texts: list[str] = []

    def render(self, events: Sequence[TokenEvent]) -> bytes:
        """Return one whole SSE event a token."""
        return b"".join([self._frame(event) for event in events])

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
            seed=self._plan.shown_seed,
            input_length=self._input_length,
        )
        return text, _encode(details)
