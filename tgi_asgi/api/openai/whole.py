"""What is told of one `/v1` answer: its identity, usage and finish reasons, and whole bodies."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.api.answer import LogprobsTracker
from tgi_asgi.api.call import Choices, Generation
from tgi_asgi.api.openai.choice import ChatChoice, finish_of
from tgi_asgi.api.openai.schema import CommonRequest
from tgi_asgi.settings import Settings
from tgi_asgi.types import TokenEvent


@dataclass(slots=True)
class Identity:
    """One answer's identity, equal in all chunks of a stream, and its token counts."""

    generation: Generation
    id: str
    created: int
    n: int  # choices a prompt
    is_compat: bool
    shows_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echoes: Sequence[str] = ()  # by prompt: text to put before each of its choices
    num_reasoning: Callable[[], int] = int  # reasoning tokens so far, over all choices
    hides_tokens: bool = False  # max_tokens was 0: the one token that was sampled is not shown

    @classmethod
    def of(
        cls, generation: Generation, request: CommonRequest, prefix: str, settings: Settings, **options: Any
    ) -> Identity:
        stream_options = request.stream_options
        include_usage = bool(stream_options and stream_options.include_usage)
        return cls(
            generation,
            id=f"{prefix}-{request.request_id or secrets.token_hex(12)}",
            created=int(time.time()),
            n=request.n or 1,
            is_compat=settings.tgi_compat,
            shows_token_ids=bool(request.return_token_ids),
            include_usage=include_usage,
            continuous_usage=include_usage and bool(stream_options and stream_options.continuous_usage_stats),
            **options,
        )

    def head(self, kind: str) -> dict[str, Any]:
        """Return what a chunk or a body begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.generation.model,
            "system_fingerprint": self.generation.info.fingerprint,
        }

    def prompt_ids(self, part: int) -> list[int]:
        """Return the tokens of a prompt."""
        return list(self.generation.jobs[part].request.prompt_ids)

    def usage(self, num_generated: int) -> dict[str, Any]:
        """Return the usage object after `num_generated` tokens over all choices."""
        num_prompt = self.generation.num_prompt_tokens
        if self.hides_tokens:
            num_generated = 0
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning()},
        }


def chat_completion(
    identity: Identity, events: Choices, trackers: Sequence[LogprobsTracker], choices: Sequence[ChatChoice]
) -> dict[str, Any]:
    """Return the body of a `chat.completion`; `choices` are there if answers have more than text."""
    echo = identity.echoes[0] if identity.echoes else ""
    body = identity.head("chat.completion") | {"choices": []}
    for index, own in enumerate(events):
        tracker = trackers[index] if trackers else None
        if choices:
            message = choices[index].message(own, tracker)
            reason = choices[index].finish_reason(own[-1])
        else:
            message = {"role": "assistant", "content": _text(own), "refusal": None}
            reason = finish_of(own[-1])
        if echo:
            message["content"] = echo + (message.get("content") or "")
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": _logprobs(() if choices else own, tracker),
            "finish_reason": reason,
            "stop_reason": own[-1].stop,
        }
        if identity.shows_token_ids:
            choice["token_ids"] = [event.token_id for event in own]
        body["choices"].append(choice)
    body["usage"] = identity.usage(sum(map(len, events)))
    if identity.shows_token_ids:
        body["prompt_token_ids"] = identity.prompt_ids(0)
    return body


def text_completion(
    identity: Identity, events: Choices, trackers: Sequence[LogprobsTracker], num_generated: int
) -> dict[str, Any]:
    """Return the body of a `text_completion`; `num_generated` counts tokens that are not shown, too."""
    body = identity.head("text_completion") | {"choices": []}
    for index, own in enumerate(events):
        prompt = index // identity.n
        shown = () if identity.hides_tokens else own
        choice = {
            "index": index,
            "text": (identity.echoes[prompt] if identity.echoes else "") + _text(shown),
            "logprobs": _logprobs(shown, trackers[index] if trackers else None),
            "finish_reason": "length" if identity.hides_tokens else finish_of(own[-1]),
            "stop_reason": None if identity.hides_tokens else own[-1].stop,
        }
        if identity.shows_token_ids:
            choice["prompt_token_ids"] = identity.prompt_ids(prompt)
            choice["token_ids"] = [event.token_id for event in shown]
        body["choices"].append(choice)
    body["usage"] = identity.usage(num_generated)
    return body


def likeliest(choices: Choices, n: int) -> list[Sequence[TokenEvent]]:
    """Return the n choices of the highest mean log-probability, best first."""
    return sorted(choices, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(events: Sequence[TokenEvent]) -> float:
    values = [event.logprob for event in events if event.logprob is not None]
    return math.fsum(values) / len(values) if values else -math.inf


def _text(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def _logprobs(events: Sequence[TokenEvent], tracker: LogprobsTracker | None) -> dict[str, Any] | None:
    if tracker is None:
        return None
    for event in events:
        tracker.push(event)
    return tracker.take()
