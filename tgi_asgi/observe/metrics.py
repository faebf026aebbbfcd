"""TGI's metrics with its names, labels and buckets, and those that vLLM's dashboards show.

Requests are counted once, after each response. The engine keeps plain counters, which are read when
`/metrics` is requested.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from tgi_asgi.engine.stats import DURATION_BUCKETS, EngineStats, Histogram
from tgi_asgi.errors import GenerationFailed, TgiError
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.observe.prometheus import Counter, Registry, Value
from tgi_asgi.observe.summary import ObservedRequest, RequestSummary

LAG_INTERVAL_S = 0.1
DROPPED = "dropped"  # the client disconnected
# Failure labels (`TgiError.failure`); TGI does not have "unavailable" (loading, draining or dead).
FAILURES = ("validation", "overloaded", "generation", "incomplete", "template", DROPPED, "unavailable")
_ADAPTERS = "vllm:lora_requests_info"
_MAX_NEW_TOKENS = 1024  # the number that TGI validates with
# Aliases: TGI's second names, and vLLM's, added once the model's name is known.
_TGI_ALIASES = {
    "tgi_batch_forward_duration": "tgi_batch_inference_duration",
    "tgi_queue_size": "tgi_requests_waiting",
    "tgi_batch_current_size": "tgi_requests_running",
}
_VLLM_ALIASES = {
    "num_requests_running": "tgi_requests_running",
    "num_requests_waiting": "tgi_requests_waiting",
    "kv_cache_usage_perc": "tgi_kv_cache_usage_ratio",
    "prefix_cache_queries_total": "tgi_prefix_cache_query_tokens_total",
    "prefix_cache_hits_total": "tgi_prefix_cache_hit_tokens_total",
    "num_preemptions_total": "tgi_preemptions_total",
    "prompt_tokens_total": "tgi_prompt_tokens_total",
    "generation_tokens_total": "tgi_generation_tokens_total",
    "spec_decode_num_drafts_total": "tgi_drafts_total",
    "spec_decode_num_draft_tokens_total": "tgi_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total": "tgi_accepted_draft_tokens_total",
    "request_success_total": "tgi_choices_total",
    "time_to_first_token_seconds": "tgi_time_to_first_token_seconds",
    "inter_token_latency_seconds": "tgi_inter_token_latency_seconds",
    "e2e_request_latency_seconds": "tgi_request_duration",
    "request_queue_time_seconds": "tgi_request_queue_duration",
    "request_inference_time_seconds": "tgi_request_inference_duration",
    "request_prefill_time_seconds": "tgi_request_prefill_duration",
    "request_decode_time_seconds": "tgi_request_decode_duration",
    "request_prompt_tokens": "tgi_request_input_length",
    "request_generation_tokens": "tgi_request_generated_tokens",
    "request_max_num_generation_tokens": "tgi_request_max_new_tokens",
}
# What the engine counts: kind, name, help text, and how to read it.
_OF_ENGINE: tuple[tuple[str, str, str, Callable[[EngineStats], Value]], ...] = (
    ("gauge", "tgi_requests_running", "Running sequences.", lambda s: s.running),
    ("gauge", "tgi_requests_waiting", "Sequences waiting for capacity.", lambda s: s.waiting),
    (
        "gauge", "tgi_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.",
        lambda s: s.blocks_used / max(s.blocks_total, 1),
    ),
    (
        "gauge", "tgi_compute_threads", "CPU threads that computed last; fewer while cores are busy.",
        lambda s: s.compute_threads,
    ),
    ("gauge", "tgi_kept_states", "Recurrent states that prompts can resume from.", lambda s: s.states_kept),
    (
        "counter", "tgi_preemptions_total", "Sequences preempted for lack of blocks.",
        lambda s: s.preemptions,
    ),
    (
        "counter", "tgi_prompt_tokens_total", "Prompt tokens, computed or cached.",
        lambda s: s.prefill_tokens + s.prefix_hit_tokens,
    ),
    ("counter", "tgi_generation_tokens_total", "Generated tokens.", lambda s: s.sampled_tokens),
    (
        "counter", "tgi_prefix_cache_query_tokens_total", "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_query_tokens,
    ),
    (
        "counter", "tgi_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_hit_tokens,
    ),
    ("counter", "tgi_drafts_total", "Times that tokens were drafted.", lambda s: s.drafted_rows),
    ("counter", "tgi_draft_tokens_total", "Draft tokens.", lambda s: s.draft_tokens),
    (
        "counter", "tgi_accepted_draft_tokens_total", "Accepted draft tokens.",
        lambda s: s.accepted_draft_tokens,
    ),
    (
        "summary", "tgi_request_skipped_tokens", "Tokens accepted beyond the first of a step.",
        lambda s: s.skipped_tokens,
    ),
    ("histogram", "tgi_inter_token_latency_seconds", "Time between tokens.", lambda s: s.inter_token_s),
    ("histogram", "tgi_batch_next_size", "Sequences in a prefill step.", lambda s: s.prefill_size),
)  # fmt: skip


class Metrics:
    """Every metric of one server.

    `app.py` calls `request_ended` after each request; `render` answers `/metrics`.
    """

    def __init__(self, block_size: int = 16) -> None:
        self._registry = Registry()
        self._engine = EngineStats()  # replaced by the real engine's once it exists
        self._usage: dict[str, tuple[Counter, ...]] = {}  # by API key: requests, tokens in, tokens out
        self._add_requests()
        self._add_lengths(1, 1)
        self._add_engine(block_size)
        for method in ("prefill", "decode"):
            self._add_steps(method)
        self._registry.add(
            "gauge", _ADAPTERS, "Adapters of running and waiting requests; value: the time.", lambda: 0.0,
            max_lora="0", running_lora_adapters="", waiting_lora_adapters="",
        )  # fmt: skip
        for name, of in _TGI_ALIASES.items():
            self._registry.alias(name, of)

    def _add_requests(self) -> None:
        counter, duration = self._registry.counter, partial(self._registry.histogram, bounds=DURATION_BUCKETS)
        self.count = counter("tgi_request_count", "Requests that reached a generating route.")
        self.success = counter("tgi_request_success", "Requests answered completely.")
        name, help = "tgi_request_failure", "Requests that failed."
        self.failure = {failure: counter(name, help, err=failure) for failure in FAILURES}
        name, help = "tgi_choices_total", "Choices by finish reason; abort: they did not finish."
        self.choices = {why: counter(name, help, finished_reason=why) for why in ("stop", "length", "abort")}
        self.duration = duration("tgi_request_duration", "From arrival to the end of the answer.")
        self.validation_duration = duration("tgi_request_validation_duration", "Validation and tokenisation.")
        self.queue_duration = duration("tgi_request_queue_duration", "Waiting for the first step.")
        self.inference_duration = duration("tgi_request_inference_duration", "From first step to end.")
        self.phase_durations = {
            "prefill": duration("tgi_request_prefill_duration", "From first step to first token."),
            "decode": duration("tgi_request_decode_duration", "From first token to end."),
        }
        self.mean_time_per_token = duration(
            "tgi_request_mean_time_per_token_duration", "Inference time over generated tokens."
        )
        self.time_to_first_token = duration("tgi_time_to_first_token_seconds", "From arrival to first token.")
        self.loop_lag = duration("tgi_event_loop_lag_seconds", "Delay of a timer on the event loop.")

    def _add_lengths(self, max_input: int, max_total: int) -> None:
        add = self._registry.histogram
        # TGI's 100 equal buckets up to the length limit.
        inputs, totals = (tuple(most * i / 100 for i in range(1, 101)) for most in (max_input, max_total))
        self.input_length = add("tgi_request_input_length", "Prompt tokens.", inputs)
        self.generated_tokens = add("tgi_request_generated_tokens", "Generated tokens.", totals)
        self.max_new_tokens = add("tgi_request_max_new_tokens", "Requested maximum of new tokens.", totals)

    def _add_engine(self, block_size: int) -> None:
        for kind, name, text, read in _OF_ENGINE:
            self._add(kind, name, text, read)
        text = "Token capacity of the KV blocks in use."
        self._add("gauge", "tgi_batch_current_max_tokens", text, lambda s: s.blocks_used * block_size)

    def _add_steps(self, method: str) -> None:
        # The engine does not report the kind of a failed step. Most steps, and so most failures, decode.
        def failed(stats: EngineStats) -> int:
            return stats.failed_steps if method == "decode" else 0

        def done(stats: EngineStats) -> int:
            return stats.step_s[method].count

        name, add = "tgi_batch_inference", self._add
        add("counter", f"{name}_count", "Steps started.", lambda s: done(s) + failed(s), method=method)
        add("counter", f"{name}_success", "Steps done.", done, method=method)
        add("counter", f"{name}_failure", "Steps that raised.", failed, method=method)
        help = "From a step's plan to its result."
        add("histogram", f"{name}_duration", help, lambda s: s.step_s[method], method=method)

    def _add(
        self, kind: str, name: str, help: str, read: Callable[[EngineStats], Value], **labels: str
    ) -> None:
        self._registry.add(kind, name, help, lambda: read(self._engine), **labels)

    def model_loaded(self, info: ModelInfo) -> None:
        """Take over the model's name and its limits, which define TGI's length buckets."""
        self._add_lengths(info.max_input_tokens, info.max_total_tokens)
        for name, of in _VLLM_ALIASES.items():
            self._registry.alias(f"vllm:{name}", of, model_name=info.model_id, engine="0")

    def request_ended(self, request: ObservedRequest, summary: RequestSummary) -> None:
        """Record a finished request, successful or not; an observer of `app.py`."""
        route = request.route
        if request.method != "POST" or route is None or not route.generates:
            return
        self.count.add()
        if request.tenant is not None:
            self._used(request.tenant, summary)
        for finish in summary.finishes:
            self.choices["length" if finish == "length" else "stop"].add()
        self.choices["abort"].add(summary.num_choices - len(summary.finishes))
        if request.channels:
            self.input_length.observe(summary.prompt_tokens)
            self.max_new_tokens.observe(min(summary.max_new_tokens, _MAX_NEW_TOKENS))
        # Recorded even if the request then failed or was dropped: those are the ones that waited longest.
        if summary.has_run:
            self.queue_duration.observe(summary.queue_s)
        if summary.first_token_s is not None:
            self.time_to_first_token.observe(summary.first_token_s)
        if request.error is not None:
            # An error that is not a TgiError is a fault of the engine or the server.
            kind = request.error if isinstance(request.error, TgiError) else GenerationFailed
            self.failure[kind.failure].add()
        elif request.is_disconnected:
            self.failure[DROPPED].add()
        else:
            self._request_succeeded(summary)

    def _used(self, key: str, summary: RequestSummary) -> None:
        """Count what a request of an API key used; the administrator names the keys, so they are few."""
        if key not in self._usage:
            add = self._registry.counter
            self._usage[key] = (
                add("tgi_key_requests_total", "Requests by API key.", key=key),
                add("tgi_key_prompt_tokens_total", "Prompt tokens of requests that ran.", key=key),
                add("tgi_key_generated_tokens_total", "Generated tokens.", key=key),
            )
        used = (1, summary.prompt_tokens if summary.has_run else 0, summary.generated_tokens)
        for counter, amount in zip(self._usage[key], used, strict=True):
            counter.add(amount)

    def _request_succeeded(self, summary: RequestSummary) -> None:
        self.success.add()
        self.duration.observe(summary.total_s)
        self.validation_duration.observe(summary.validation_s)
        self.inference_duration.observe(summary.inference_s)
        for name, begin_s, end_s in summary.phases:
            if name in self.phase_durations:
                self.phase_durations[name].observe(end_s - begin_s)
        self.mean_time_per_token.observe(summary.inference_s / max(summary.generated_tokens, 1))
        self.generated_tokens.observe(summary.generated_tokens)

    def render(self, stats: EngineStats | None = None) -> bytes:
        """Return the exposition, with the engine's current numbers (none while the model loads)."""
        self._engine = stats or self._engine
        if self._engine.adapters is not None:
            running, waiting = self._engine.adapters()
            self._registry.set_series(
                _ADAPTERS, time.time(), max_lora=str(self._engine.max_adapters),
                running_lora_adapters=",".join(running), waiting_lora_adapters=",".join(waiting),
            )  # fmt: skip
        return self._registry.render()


class LoopLag:
    """Measures ten times a second how late a timer runs. `stop` ends it."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start on the running event loop."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + LAG_INTERVAL_S
        self._timer = loop.call_at(due_s, self._tick, loop, due_s)

    def stop(self) -> None:
        """Stop. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self._histogram.observe(max(loop.time() - due_s, 0.0))
        self.start()
