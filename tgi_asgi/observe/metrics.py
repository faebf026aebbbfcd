"""What is measured: TGI's metrics by name, label and bucket, and what vLLM's dashboards show besides.

Requests are counted once, at the HTTP edge, after each response; the engine keeps its own plain counters,
which are read when `/metrics` is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from tgi_asgi.errors import (
    Forbidden,
    GenerationFailed,
    IncompleteGeneration,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    TemplateError,
    TgiError,
    Unavailable,
    UnsupportedMediaType,
)
from tgi_asgi.observe.course import Course
from tgi_asgi.observe.prometheus import Counter, Gauge, Histogram, Registry, Summary
from tgi_asgi.http.tgi_validation import MAX_TESTED_NEW_TOKENS
from tgi_asgi.types import ModelInfo

_FAILURES: tuple[tuple[type[TgiError], str], ...] = (
    (TemplateError, "template"),
    (InvalidRequest, "validation"),
    (Overloaded, "overloaded"),
    (GenerationFailed, "generation"),
    (IncompleteGeneration, "incomplete"),
    # What a client can be told to mend is TGI's "validation", whatever its status.
    (PayloadTooLarge, "validation"),
    (RequestTimeout, "validation"),
    (UnsupportedMediaType, "validation"),
    (NotFound, "validation"),
    (Forbidden, "validation"),
    (MethodNotAllowed, "validation"),
)
if TYPE_CHECKING:
    from tgi_asgi.engine.stats import EngineStats
    from tgi_asgi.http.exchange import Exchange

_Made = TypeVar("_Made", Counter, Histogram)

DROPPED = "dropped"  # the client went away
UNAVAILABLE = "unavailable"  # loading, draining or dead; TGI has no such state
FAILURES = ("validation", "overloaded", "generation", "incomplete", "template", DROPPED, UNAVAILABLE)
METHODS = ("prefill", "decode")
CONCAT_REASONS = ("backpressure", "wait_exceeded", "chunking")
GENERATING_ROUTES = frozenset(
    {
        "/",
        "/generate",
        "/generate_stream",
        "/invocations",
        "/vertex",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
    }
)  # fmt: skip
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


class Metrics:
    """Every metric of one server.

    `app.py` calls `request_ended` after each request; `/metrics` is `render`.
    """

    def __init__(self, block_size: int = 16) -> None:
        self._block_size = block_size
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
        self.prompt_tokens = counter("tgi_prompt_tokens_total", "Prompt tokens, computed or cached.")
        self.generation_tokens = counter("tgi_generation_tokens_total", "Generated tokens.")
        self.loop_lag = duration(
            "tgi_event_loop_lag_seconds", "How late a timer runs: what blocks the loop delays every client."
        )
        self.prefix_query_tokens = counter(
            "tgi_prefix_cache_query_tokens_total", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hit_tokens = counter(
            "tgi_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache."
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

    def request_ended(self, exchange: Exchange) -> None:
        """Record a request, whatever became of it; an observer of `app.py`."""
        if exchange.method != "POST" or exchange.route not in GENERATING_ROUTES:
            return
        self.count.add()
        course = Course.of(exchange)
        if exchange.channels:
            self.input_length.observe(course.prompt_tokens)
            self.max_new_tokens.observe(min(course.max_new_tokens, MAX_TESTED_NEW_TOKENS))
        if exchange.error is not None:
            self.failure[_failure(exchange.error)].add()
        elif exchange.is_disconnected:
            self.failure[DROPPED].add()
        else:
            self._request_succeeded(course)

    def _request_succeeded(self, course: Course) -> None:
        self.success.add()
        self.duration.observe(course.total_s)
        self.validation_duration.observe(course.validation_s)
        self.queue_duration.observe(course.queue_s)
        self.inference_duration.observe(course.inference_s)
        self.mean_time_per_token.observe(course.inference_s / max(course.generated_tokens, 1))
        self.generated_tokens.observe(course.generated_tokens)
        if course.first_token_s is not None:
            self.time_to_first_token.observe(course.first_token_s)

    def render(self, stats: EngineStats | None = None) -> bytes:
        """Return the exposition, with the engine's numbers as they are now (none while the model loads)."""
        if stats is not None:
            self._read_engine(stats)
        return self._registry.render()

    def _read_engine(self, stats: EngineStats) -> None:
        for method, durations in stats.step_s.items():
            self.batch_success[method].value = durations.count
            self.batch_inference[method].copy_from(durations)
            self.batch_forward[method].copy_from(durations)
        self.inter_token_latency.copy_from(stats.inter_token_s)
        self.batch_next_size.copy_from(stats.prefill_size)
        # The engine does not tell of which kind a failed step was: most steps, and most failures, decode.
        self.batch_failure["decode"].value = stats.failed_steps
        for method in METHODS:
            self.batch_count[method].value = (
                self.batch_success[method].value + self.batch_failure[method].value
            )
        self._queue_size.value = self._waiting.value = stats.waiting
        self._current_size.value = self._running.value = stats.running
        self._current_max_tokens.value = stats.blocks_used * self._block_size
        self._kv_usage.value = stats.blocks_used / max(stats.blocks_total, 1)
        self._preemptions.value = stats.preemptions
        self.generation_tokens.value = stats.sampled_tokens
        self.prompt_tokens.value = stats.prefill_tokens + stats.prefix_hit_tokens
        self.prefix_query_tokens.value = stats.prefix_query_tokens
        self.prefix_hit_tokens.value = stats.prefix_hit_tokens

    def _counter(self, name: str, help: str) -> Counter:
        return self._registry.add(name, help, Counter())

    def _gauge(self, name: str, help: str) -> Gauge:
        return self._registry.add(name, help, Gauge())

    def _duration(self, name: str, help: str) -> Histogram:
        return self._registry.add(name, help, _durations())

    def _by_method(self, name: str, help: str, make: Callable[[], _Made]) -> dict[str, _Made]:
        return self._registry.add_labelled(name, help, make, "method", METHODS)


def _failure(error: BaseException) -> str:
    """Return TGI's label for an error; what is no error of ours is the engine's or the server's."""
    if isinstance(error, Unavailable):
        return UNAVAILABLE
    return next((label for kind, label in _FAILURES if isinstance(error, kind)), "generation")


def _durations() -> Histogram:
    return Histogram(DURATION_BUCKETS)
