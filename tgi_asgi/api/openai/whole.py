"""OpenAI's whole responses, for requests that do not stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tgi_asgi.api.call import Choices
from tgi_asgi.api.openai.choice import ChatChoice
from tgi_asgi.api.openai.identity import Identity, finish_of
from tgi_asgi.api.reader import LogprobsTracker
from tgi_asgi.types import TokenEvent


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
