"""What is measured: TGI's metrics by name, label and bucket, and what vLLM's dashboards show besides.

`requests` are counted once, at the HTTP edge. The engine knows nothing of this file: it is given an observer
with `step_done` and `step_failed`, and `/metrics` reads its gauges when it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tgi_asgi.errors import (
    GenerationFailed,
    IncompleteGeneration,
    InvalidRequest,
    Overloaded,
    TemplateError,
    TgiError,
)
from tgi_asgi.http.prometheus import Counter, Gauge, Histogram, Registry, Summary
from tgi_asgi.types import ModelInfo, RequestStats

_FAILURES: tuple[tuple[type[TgiError], str], ...] = (
    (TemplateError, "template"),
    (InvalidRequest, "validation"),
    (Overloaded, "overloaded"),
    (GenerationFailed, "generation"),
    (IncompleteGeneration, "incomplete"),
)
_Made = TypeVar("_Made", Counter, Histogram)

DROPPED = "dropped"  # the client went away
UNAVAILABLE = "unavailable"  # loading, draining or dead; TGI has no such state
FAILURES = ("validation", "overloaded", "generation", "incomplete", "template", DROPPED, UNAVAILABLE)
METHODS = ("prefill", "decode")
CONCAT_REASONS = ("backpressure", "wait_exceeded", "chunking")
BATCH_BUCKETS = [float(size) for size in range(1, 1025)]


def _duration_buckets() -> list[float]:
    bounds, bound = [], 0.0001
    for _ in range(35):
        bound *= 1.5
        bounds.append(bound)
    return bounds


DURATION_BUCKETS = _duration_buckets()  # seconds: 0.0001 * 1.5**k, 0.15 ms to 145.6 s


def length_buckets(most: int) -> list[float]:
    """Return TGI's 100 bounds for lengths up to `most` tokens."""
    return [most * i / 100 for i in range(1, 101)]


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """The engine's state at one moment."""

    running: int = 0  # sequences in the batch
    waiting: int = 0  # sequences that wait for room
    running_max_tokens: int = 0  # tokens that the batch may come to hold
    kv_usage: float = 0.0  # share of the KV cache in use, 0 to 1
    preemptions: int = 0  # since the start


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request's course in seconds, as the HTTP edge and the engine saw it."""

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float
    first_token_s: float | None  # since arrival; None: there was no token

    @classmethod
    def of(cls, arrival_s: float, submitted_s: float, now_s: float, stats: RequestStats) -> RequestTimes:
        """Take the times from a request's stats; all arguments are of `time.monotonic()`."""
        scheduled = now_s if stats.scheduled_s is None else stats.scheduled_s
        finished = now_s if stats.finished_s is None else stats.finished_s
        first = stats.first_token_s
        return cls(
            total_s=now_s - arrival_s,
            validation_s=submitted_s - arrival_s,
            queue_s=max(scheduled - submitted_s, 0.0),
            inference_s=max(finished - scheduled, 0.0),
            first_token_s=None if first is None else first - arrival_s,
        )


class Metrics:
    """Every metric of one server.

    Routes call the `request_*` methods, the engine's observer is `step_done` and `step_failed`, and `render`
    is `/metrics`.
    """

    def __init__(self, read_engine: Callable[[], EngineGauges] = EngineGauges) -> None:
        self.read_engine = read_engine
        self._registry = Registry()
        self._make_request_metrics()
        self._make_batch_metrics()
        self._make_engine_metrics()
        self._make_length_metrics(1, 1)

    def _make_request_metrics(self) -> None:
        add, counter, duration = self._registry.add, self._counter, self._duration
        self.count = counter("tgi_request_count", "Requests that reached a generating route.")
        self.success = counter("tgi_request_success", "Requests answered whole.")
        self.failure = self._registry.add_labelled(
            "tgi_request_failure", "Requests that failed.", Counter, "err", FAILURES
        )
        self.duration = duration("tgi_request_duration", "From arrival to the answer's end.")
        self.validation_duration = duration("tgi_request_validation_duration", "Validation and tokenisation.")
        self.queue_duration = duration("tgi_request_queue_duration", "Waiting for the first step.")
        self.inference_duration = duration(
            "tgi_request_inference_duration", "From the first step to the end."
        )
        self.mean_time_per_token = duration(
            "tgi_request_mean_time_per_token_duration", "Inference time over generated tokens."
        )
        self.skipped_tokens = add("tgi_request_skipped_tokens", "Speculated tokens accepted.", Summary())

    def _make_batch_metrics(self) -> None:
        add, by_method = self._registry.add, self._by_method
        self.batch_count = by_method("tgi_batch_inference_count", "Steps started.", Counter)
        self.batch_success = by_method("tgi_batch_inference_success", "Steps done.", Counter)
        self.batch_failure = by_method("tgi_batch_inference_failure", "Steps that raised.", Counter)
        self._registry.add_labelled(
            "tgi_batch_concat", "Requests that joined a running batch.", Counter, "reason", CONCAT_REASONS
        )
        self.batch_inference = by_method(
            "tgi_batch_inference_duration", "A step from plan to result.", _durations
        )
        self.batch_forward = by_method("tgi_batch_forward_duration", "A step's computation.", _durations)
        # These three are parts of TGI's step that ours does not have apart: they stay at zero.
        by_method("tgi_batch_decode_duration", "Detokenisation.", _durations)
        by_method("tgi_batch_filter_duration", "Dropping finished sequences.", _durations)
        add("tgi_batch_concat_duration", "Joining batches.", _durations(), 'method="decode"')
        self.batch_next_size = add(
            "tgi_batch_next_size", "Sequences of a prefill step.", Histogram(BATCH_BUCKETS)
        )

    def _make_engine_metrics(self) -> None:
        gauge, counter, duration = self._gauge, self._counter, self._duration
        self._queue_size = gauge("tgi_queue_size", "Sequences that wait for their first step.")
        self._current_size = gauge("tgi_batch_current_size", "Sequences in the running batch.")
        self._current_max_tokens = gauge(
            "tgi_batch_current_max_tokens", "Tokens that the running batch may come to hold."
        )
        self._running = gauge("tgi_requests_running", "Sequences that generate.")
        self._waiting = gauge("tgi_requests_waiting", "Sequences that wait for room.")
        self._kv_usage = gauge("tgi_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.")
        self._preemptions = counter("tgi_preemptions_total", "Sequences preempted for want of room.")
        self.time_to_first_token = duration(
            "tgi_time_to_first_token_seconds", "From arrival to the first token."
        )
        self.inter_token_latency = duration(
            "tgi_inter_token_latency_seconds", "Between two tokens of one sequence."
        )
        self.prompt_tokens = counter("tgi_prompt_tokens_total", "Prompt tokens of answered requests.")
        self.generation_tokens = counter("tgi_generation_tokens_total", "Generated tokens of those.")
        self.prefix_hit_tokens = counter(
            "tgi_prefix_cache_hit_tokens_total", "Prompt tokens of those that the prefix cache gave."
        )

    def _make_length_metrics(self, max_input: int, max_total: int) -> None:
        add = self._registry.add
        self.input_length = add(
            "tgi_request_input_length", "Prompt tokens.", Histogram(length_buckets(max_input))
        )
        self.generated_tokens = add(
            "tgi_request_generated_tokens", "Generated tokens.", Histogram(length_buckets(max_total))
        )
        self.max_new_tokens = add(
            "tgi_request_max_new_tokens", "Tokens asked for.", Histogram(length_buckets(max_total))
        )

    def model_loaded(self, info: ModelInfo) -> None:
        """Size the length histograms, whose buckets TGI derives from the model's limits."""
        self._make_length_metrics(info.max_input_tokens, info.max_total_tokens)

    def request_arrived(self) -> None:
        """Record a request to a generating route, whatever becomes of it."""
        self.count.add()

    def request_validated(self, input_length: int, max_new_tokens: int) -> None:
        """Record a request that is about to be submitted."""
        self.input_length.observe(input_length)
        self.max_new_tokens.observe(max_new_tokens)

    def request_finished(self, times: RequestTimes, stats: RequestStats, input_length: int) -> None:
        """Record a request that was answered whole."""
        self.success.add()
        self.duration.observe(times.total_s)
        self.validation_duration.observe(times.validation_s)
        self.queue_duration.observe(times.queue_s)
        self.inference_duration.observe(times.inference_s)
        self.mean_time_per_token.observe(times.inference_s / max(stats.generated_tokens, 1))
        self.generated_tokens.observe(stats.generated_tokens)
        if times.first_token_s is not None:
            self.time_to_first_token.observe(times.first_token_s)
        self.prompt_tokens.add(input_length)
        self.generation_tokens.add(stats.generated_tokens)
        self.prefix_hit_tokens.add(stats.cached_tokens)

    def request_failed(self, error: TgiError) -> None:
        """Record a request that ended with an error."""
        label = next((label for kind, label in _FAILURES if isinstance(error, kind)), UNAVAILABLE)
        self.failure[label].add()

    def request_dropped(self) -> None:
        """Record a request whose client went away."""
        self.failure[DROPPED].add()

    def step_done(self, method: str, inference_s: float, forward_s: float, size: int) -> None:
        """Record a step: `method` is prefill or decode, `size` its sequences."""
        self.batch_count[method].add()
        self.batch_success[method].add()
        self.batch_inference[method].observe(inference_s)
        self.batch_forward[method].observe(forward_s)
        if method == "decode":
            self.inter_token_latency.observe(inference_s, size)
        else:
            self.batch_next_size.observe(size)

    def step_failed(self, method: str) -> None:
        """Record a step that raised."""
        self.batch_count[method].add()
        self.batch_failure[method].add()

    def render(self) -> bytes:
        """Return the exposition, the engine's gauges read just now."""
        now = self.read_engine()
        self._queue_size.value = self._waiting.value = now.waiting
        self._current_size.value = self._running.value = now.running
        self._current_max_tokens.value = now.running_max_tokens
        self._kv_usage.value = now.kv_usage
        self._preemptions.value = now.preemptions
        return self._registry.render()

    def _counter(self, name: str, help: str) -> Counter:
        return self._registry.add(name, help, Counter())

    def _gauge(self, name: str, help: str) -> Gauge:
        return self._registry.add(name, help, Gauge())

    def _duration(self, name: str, help: str) -> Histogram:
        return self._registry.add(name, help, _durations())

    def _by_method(self, name: str, help: str, make: Callable[[], _Made]) -> dict[str, _Made]:
        return self._registry.add_labelled(name, help, make, "method", METHODS)


def _durations() -> Histogram:
    return Histogram(DURATION_BUCKETS)
