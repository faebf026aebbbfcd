"""Native answers from token events: complete ones as structs, streams as bytes ready to send.

Stream frames are assembled from prebuilt bytes, because there is one per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from msgspec import UNSET, UnsetType

from tgi_asgi.api.answer import Choices, likeliest
from tgi_asgi.api.call import Generation, Renderer
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


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What to include in the answer to a request."""

    is_sampled: bool
    details: bool
    top_n: int
    text_prefix: str  # `inputs` if the full text is requested, else empty
    seeds: tuple[int, ...]  # by choice, [0, 2**64): the client's, or random
    starts: tuple[int, ...] = ()  # tokens to show in place of the prompt's: an encoder-decoder's first ones

    def seed(self, choice: int = 0) -> int | None:
        """Return the seed to report for a choice, or None if nothing was sampled."""
        return self.seeds[choice] if self.is_sampled else None


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text on its own, as for prompt and alternative tokens."""
    if token_id in tokenizer.special_ids:
        return tokenizer.token_text(token_id)
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _top_tokens(tokenizer: Tokenizer, event: TokenEvent) -> list[Token]:
    return [
        Token(token_id, token_text(tokenizer, token_id), logprob, token_id in tokenizer.special_ids)
        for token_id, logprob in event.top or ()
    ]


def _token(tokenizer: Tokenizer, event: TokenEvent) -> Token:
    text = tokenizer.token_text(event.token_id) if event.is_special else event.text
    return Token(event.token_id, text, event.logprob, event.is_special)


def text_of(events: Events) -> str:
    """Return a choice's whole text."""
    return "".join([event.text for event in events])


class NativeRenderer(Renderer):
    """Renders one request's events as a complete answer or as frames.

    A stream ends with the event of its last token, which has the whole text: there is no `[DONE]`.

    Args:
        is_list: Whether a complete answer is an array of one object, as on `POST /`.
    """

    __slots__ = ("_generation", "_is_list", "_num_tokens", "_options", "_texts", "_tokenizer")

    def __init__(self, generation: Generation, options: AnswerOptions, *, is_list: bool = False) -> None:
        self._generation = generation
        self._options = options
        self._is_list = is_list
        self._tokenizer = generation.served.tokenizer
        self._num_tokens = 0
        self._texts: list[str] = []

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the body; of several sequences, the likeliest is the answer."""
        [choices] = job_choices
        [best] = likeliest(choices)
        self._generation.num_shown = len(choices[best])
        texts = [self._options.text_prefix + text_of(events) for events in choices]
        details: Details | UnsetType = UNSET
        if self._options.details:
            prefill = self._prefill()
            all_details = [self._details_of(index, events, prefill) for index, events in enumerate(choices)]
            losers = [
                BestOfSequence(generated_text=text, **each)
                for index, (text, each) in enumerate(zip(texts, all_details, strict=True))
                if index != best
            ]
            details = Details(**all_details[best], best_of_sequences=losers or UNSET)
        answer = GenerateResponse(texts[best], details)
        return _encode([answer] if self._is_list else answer)

    def _details_of(self, choice: int, events: Events, prefill: list[PrefillToken]) -> dict[str, Any]:
        """Return the details of a choice."""
        finish = events[-1].finish
        assert finish is not None, "a choice ended without a finish reason"
        top_tokens = (
            [_top_tokens(self._tokenizer, event) for event in events] if self._options.top_n else UNSET
        )
        return {
            "finish_reason": FINISH_NAMES[finish],
            "generated_tokens": len(events),
            "seed": self._options.seed(choice),
            "prefill": prefill,
            "tokens": [_token(self._tokenizer, event) for event in events],
            "top_tokens": top_tokens,
        }

    def render(self, job_index: int, events: Sequence[TokenEvent]) -> bytes:
        """Return one complete SSE event per token; a native stream has one job."""
        return b"".join([self._frame(event) for event in events])

    def fail(self, error: TgiError) -> bytes:
        """Return the event that ends a failed stream."""
        return error_event(error, NATIVE)

    def _prefill(self) -> list[PrefillToken]:
        """Return the prompt's tokens with their log-probabilities; empty unless requested."""
        [channel] = self._generation.channels
        logprobs = channel.stats.prompt_logprobs
        if logprobs is None:
            return [
                PrefillToken(token_id, token_text(self._tokenizer, token_id), None)
                for token_id in self._options.starts
            ]
        return [
            PrefillToken(token_id, token_text(self._tokenizer, token_id), logprob)
            for token_id, (logprob, _) in zip(channel.request.prompt_ids, logprobs, strict=True)
        ]

    def _frame(self, event: TokenEvent) -> bytes:
        self._num_tokens += 1
        self._texts.append(event.text)
        text = self._tokenizer.token_text(event.token_id) if event.is_special else event.text
        head = b'data: {"index":%d,"token":{"id":%d,"text":%b,"logprob":%b,"special":%b}' % (
            self._num_tokens,
            event.token_id,
            orjson.dumps(text),
            orjson.dumps(event.logprob),
            b"true" if event.is_special else b"false",
        )
        if self._options.top_n:
            head += b',"top_tokens":' + _encode(_top_tokens(self._tokenizer, event))
        if event.finish is None:
            return head + b',"generated_text":null,"details":null}\n\n'
        return head + b',"generated_text":%b,"details":%b}\n\n' % self._ending(event.finish)

    def _ending(self, finish: FinishReason) -> tuple[bytes, bytes]:
        text = orjson.dumps(self._options.text_prefix + "".join(self._texts))
        if not self._options.details:
            return text, b"null"
        details = StreamDetails(
            finish_reason=FINISH_NAMES[finish],
            generated_tokens=self._num_tokens,
            seed=self._options.seed(),
            input_length=self._generation.num_prompt_tokens,
        )
        return text, _encode(details)
