"""Sizes and times of one request, read from its exchange: for metrics, logs, traces and TGI's headers.

Complete answers carry all of TGI's headers; streams carry only those known before the first token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tgi_asgi.model_info import ModelInfo

if TYPE_CHECKING:
    from tgi_asgi.api.asgi import Header
    from tgi_asgi.api.exchange import Exchange


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """A request's sizes and times so far, over all its channels (prompts)."""

    total_s: float  # since handling of the request began
    validation_s: float = 0.0  # until submission
    queue_s: float = 0.0  # from submission to the first step that ran one of its tokens
    inference_s: float = 0.0  # from that step to its last token
    has_run: bool = False  # whether there was such a step
    first_token_s: float | None = None  # since the request's start; None: no token yet
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    max_new_tokens: int = 0
    num_choices: int = 0
    finishes: tuple[str, ...] = ()  # finish reasons of the choices that have ended
    # The phases validation, queue, prefill (to the first token) and decode: (name, begin, end),
    # `time.monotonic()`.
    phases: tuple[tuple[str, float, float], ...] = ()

    @classmethod
    def of(cls, exchange: Exchange) -> RequestSummary:
        """Return the request's sizes and times as of now; those of an ended one are read once.

        Reading those of the 2,048 channels that a call for vectors may have takes milliseconds.
        """
        now_s = time.monotonic()
        channels = exchange.channels
        if exchange.summary is not None:
            return replace(exchange.summary, total_s=now_s - exchange.started_s)
        if not channels:
            return cls(total_s=now_s - exchange.started_s)
        stats = [channel.stats for channel in channels]
        submitted_s = min(s.arrival_s for s in stats)
        begun_s = min((s.scheduled_s for s in stats if s.scheduled_s is not None), default=None)
        scheduled_s = now_s if begun_s is None else begun_s
        finished_s = max(now_s if s.finished_s is None else s.finished_s for s in stats)
        first_s = min((s.first_token_s for s in stats if s.first_token_s is not None), default=None)
        until_first_s = finished_s if first_s is None else first_s
        moments = (exchange.started_s, submitted_s, scheduled_s, until_first_s, finished_s)
        names = ("validation", "queue", "prefill", "decode")
        phases = zip(names, moments, moments[1:], strict=False)
        summary = cls(
            total_s=now_s - exchange.started_s,
            validation_s=max(submitted_s - exchange.started_s, 0.0),
            queue_s=max(scheduled_s - submitted_s, 0.0),
            inference_s=max(finished_s - scheduled_s, 0.0),
            has_run=begun_s is not None,
            first_token_s=None if first_s is None else max(first_s - exchange.started_s, 0.0),
            prompt_tokens=sum(len(channel.request.prompt_ids) for channel in channels),
            cached_tokens=sum(s.cached_tokens for s in stats),
            generated_tokens=sum(s.generated_tokens for s in stats),
            max_new_tokens=max(channel.request.stop.max_tokens for channel in channels),
            num_choices=sum(channel.request.n for channel in channels),
            finishes=tuple(finish.value for s in stats for finish in s.finishes),
            phases=tuple((name, begin_s, max(end_s, begin_s)) for name, begin_s, end_s in phases),
        )
        if all(s.finished_s is not None for s in stats):
            exchange.summary = summary
        return summary


def stream_headers(exchange: Exchange, info: ModelInfo, *, characters: int) -> list[Header]:
    """Return the TGI headers of a stream; `characters` is the length of the prompt's text."""
    # The administrator's COMPUTE_TYPE, otherwise TGI's `{shards}-{device}`.
    compute_type = exchange.context.settings.compute_type or f"{info.num_shards}-{info.device}"
    return [
        (b"x-compute-type", compute_type.encode("latin-1", "replace")),
        (b"x-compute-characters", b"%d" % characters),
    ]


def sync_headers(
    exchange: Exchange,
    info: ModelInfo,
    *,
    characters: int,
    num_tokens: int | None = None,
    is_sum: bool = False,
) -> list[Header]:
    """Return the TGI headers of a complete answer; times are whole milliseconds, rounded down.

    Args:
        characters: Length of the prompt's text.
        num_tokens: Number of generated tokens; by default those of all the request's choices.
        is_sum: Whether the answer covers several prompts; TGI then omits `x-compute-time`.
    """
    summary = RequestSummary.of(exchange)
    num_tokens = summary.generated_tokens if num_tokens is None else num_tokens
    milliseconds = (
        (b"x-total-time", summary.total_s),
        (b"x-validation-time", summary.validation_s),
        (b"x-queue-time", summary.queue_s),
        (b"x-inference-time", summary.inference_s),
        (b"x-time-per-token", summary.inference_s / max(num_tokens, 1)),
    )
    return [
        *stream_headers(exchange, info, characters=characters),
        *(() if is_sum else ((b"x-compute-time", b"%.9f" % summary.total_s),)),
        *((name, b"%d" % int(seconds * 1000)) for name, seconds in milliseconds),
        (b"x-prompt-tokens", b"%d" % summary.prompt_tokens),
        (b"x-generated-tokens", b"%d" % num_tokens),
    ]
