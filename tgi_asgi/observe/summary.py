"""What observers read of a request, and its sizes and times: for metrics, logs, traces and headers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tgi_asgi.model_info import ModelInfo
from tgi_asgi.types import Channel, EngineState


class ObservedRoute(Protocol):
    """What is read of a request's route."""

    @property
    def path(self) -> str: ...
    @property
    def generates(self) -> bool: ...
    @property
    def is_quiet(self) -> bool: ...


class ObservedServer(Protocol):
    """What is read of the server."""

    @property
    def state(self) -> EngineState: ...
    @property
    def info(self) -> ModelInfo | None: ...


class ObservedRequest(Protocol):
    """What is read of a request, `api.exchange.Exchange`, which defines the terms.

    Attributes:
        summary: Set once the request's channels have ended.
    """

    summary: RequestSummary | None

    @property
    def context(self) -> ObservedServer: ...
    @property
    def scope(self) -> Mapping[str, Any]: ...
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def route(self) -> ObservedRoute | None: ...
    @property
    def request_id(self) -> str: ...
    @property
    def tenant(self) -> str | None: ...
    @property
    def started_s(self) -> float: ...
    @property
    def status(self) -> int | None: ...
    @property
    def channels(self) -> Sequence[Channel]: ...
    @property
    def error(self) -> BaseException | None: ...
    @property
    def is_disconnected(self) -> bool: ...

    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name."""


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
    def of(cls, request: ObservedRequest) -> RequestSummary:
        """Return the request's sizes and times as of now; those of an ended one are read once.

        Reading those of the 2,048 channels that a call for vectors may have takes milliseconds.
        """
        now_s = time.monotonic()
        channels = request.channels
        if request.summary is not None:
            return replace(request.summary, total_s=now_s - request.started_s)
        if not channels:
            return cls(total_s=now_s - request.started_s)
        stats = [channel.stats for channel in channels]
        submitted_s = min(s.arrival_s for s in stats)
        begun_s = min((s.scheduled_s for s in stats if s.scheduled_s is not None), default=None)
        scheduled_s = now_s if begun_s is None else begun_s
        finished_s = max(now_s if s.finished_s is None else s.finished_s for s in stats)
        first_s = min((s.first_token_s for s in stats if s.first_token_s is not None), default=None)
        until_first_s = finished_s if first_s is None else first_s
        moments = (request.started_s, submitted_s, scheduled_s, until_first_s, finished_s)
        names = ("validation", "queue", "prefill", "decode")
        phases = zip(names, moments, moments[1:], strict=False)
        summary = cls(
            total_s=now_s - request.started_s,
            validation_s=max(submitted_s - request.started_s, 0.0),
            queue_s=max(scheduled_s - submitted_s, 0.0),
            inference_s=max(finished_s - scheduled_s, 0.0),
            has_run=begun_s is not None,
            first_token_s=None if first_s is None else max(first_s - request.started_s, 0.0),
            prompt_tokens=sum(len(channel.request.prompt_ids) for channel in channels),
            cached_tokens=sum(s.cached_tokens for s in stats),
            generated_tokens=sum(s.generated_tokens for s in stats),
            max_new_tokens=max(channel.request.stop.max_tokens for channel in channels),
            num_choices=sum(channel.request.n for channel in channels),
            finishes=tuple(finish.value for s in stats for finish in s.finishes),
            phases=tuple((name, begin_s, max(end_s, begin_s)) for name, begin_s, end_s in phases),
        )
        if all(s.finished_s is not None for s in stats):
            request.summary = summary
        return summary
