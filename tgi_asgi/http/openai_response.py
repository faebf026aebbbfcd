"""OpenAI's whole responses, for requests that do not stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tgi_asgi.http.openai_answer import Answer, finish_of
from tgi_asgi.http.openai_reply import ChoiceReply, LogprobsTracker
from tgi_asgi.types import TokenEvent

Choices = Sequence[Sequence[TokenEvent]]  # each choice's events


def chat_completion(
    answer: Answer, choices: Choices, trackers: Sequence[LogprobsTracker], replies: Sequence[ChoiceReply] = ()
) -> dict[str, Any]:
    """Return the body of a `chat.completion`; `replies` are there if answers have more than text."""
    echo = answer.echoes[0] if answer.echoes else ""
    messages: list[dict[str, Any]] = [
        replies[index].message(replies[index].push(events, trackers[index] if trackers else None))
        if replies
        else {"role": "assistant", "content": _text(events), "refusal": None}
        for index, events in enumerate(choices)
    ]
    body = _body(answer, "chat.completion", sum(map(len, choices)))
    for index, (events, message) in enumerate(zip(choices, messages, strict=True)):
        if echo:
            message["content"] = echo + (message.get("content") or "")
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": _logprobs(() if replies else events, trackers, index),
            "finish_reason": replies[index].finish_reason(events[-1]) if replies else finish_of(events[-1]),
            "stop_reason": events[-1].stop,
        }
        if answer.shows_token_ids:
            choice["token_ids"] = [event.token_id for event in events]
        body["choices"].append(choice)
    if answer.shows_token_ids:
        body["prompt_token_ids"] = list(answer.prompts[0])
    return body


def text_completion(
    answer: Answer, choices: Choices, trackers: Sequence[LogprobsTracker], num_generated: int
) -> dict[str, Any]:
    """Return the body of a `text_completion`; `num_generated` counts tokens that are not shown, too."""
    body = _body(answer, "text_completion", num_generated)
    for index, events in enumerate(choices):
        prompt = index // answer.n
        shown = () if answer.hides_tokens else events
        choice = {
            "index": index,
            "text": (answer.echoes[prompt] if answer.echoes else "") + _text(shown),
            "logprobs": _logprobs(shown, trackers, index),
            "finish_reason": "length" if answer.hides_tokens else finish_of(events[-1]),
            "stop_reason": None if answer.hides_tokens else events[-1].stop,
        }
        if answer.shows_token_ids:
            choice["prompt_token_ids"] = list(answer.prompts[prompt])
            choice["token_ids"] = [event.token_id for event in shown]
        body["choices"].append(choice)
    return body


def likeliest(choices: Choices, n: int) -> list[Sequence[TokenEvent]]:
    """Return the n choices of the highest mean log-probability, best first."""
    return sorted(choices, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(events: Sequence[TokenEvent]) -> float:
    values = [event.logprob for event in events if event.logprob is not None]
    return math.fsum(values) / len(values) if values else -math.inf


def _body(answer: Answer, kind: str, num_generated: int) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": answer.fingerprint,
        "choices": [],
        "usage": answer.usage(num_generated),
    }


def _text(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def _logprobs(
    events: Sequence[TokenEvent], trackers: Sequence[LogprobsTracker], index: int
) -> dict[str, Any] | None:
    if not trackers:
        return None
    for event in events:
        trackers[index].push(event)
    return trackers[index].take()
