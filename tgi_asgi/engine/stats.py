"""Counters of the engine, filled by it and read by whoever shows metrics. Plain numbers of one thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

# Upper bounds of histograms, here and in metrics, as TGI has them.
DURATION_BUCKETS = tuple(0.0001 * 1.5**k for k in range(1, 36))  # seconds: 0.15 ms to 145.6 s
BATCH_BUCKETS = tuple(float(size) for size in range(1, 1025))
SKIPPED_BUCKETS = tuple(float(count) for count in range(65))


class Histogram:
    """Count values by upper bound, as Prometheus does; `counts` has one more entry, for what is above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


class EngineStats:
    """What the engine did since it started (counters) and holds now (gauges).

    Attributes:
        accepted, finished, failed, cancelled: requests; accepted = finished + failed + cancelled + open.
        sampled_tokens: tokens delivered; prefill_tokens: prompt tokens computed.
        prefix_query_tokens, prefix_hit_tokens: prompt tokens looked up in the prefix cache, and found.
        steps, failed_steps, preemptions: as they say.
        step_s: durations of steps, by "prefill" (some prompt tokens) and "decode" (none).
        inter_token_s: time between two tokens of a sequence, each counted.
        prefill_size: sequences that a step with prompt tokens read them for.
        batch_size: rows of the newest step.
        drafted_rows, draft_tokens, accepted_draft_tokens: rows with drafts, these, and those that were drawn.
        skipped_tokens: tokens that a row drew beyond its first, where it drew any.
        running, waiting: sequences with a slot, and without.
        blocks_used, blocks_total: of the KV cache.
        states_kept: that prompts can go on from, of models with recurrent layers.
        adapters: returns the names of adapters of requests that run, and that wait; None: none are served.
        max_adapters: different ones that a step may have.
    """

    __slots__ = (
        "accepted", "accepted_draft_tokens", "adapters", "batch_size", "blocks_total", "blocks_used",
        "cancelled", "draft_tokens", "drafted_rows", "failed", "failed_steps", "finished", "inter_token_s",
        "max_adapters", "preemptions", "prefill_size", "prefill_tokens", "prefix_hit_tokens",
        "prefix_query_tokens", "running", "sampled_tokens", "skipped_tokens", "states_kept", "step_s",
        "steps", "waiting",
    )  # fmt: skip

    def __init__(self) -> None:
        self.accepted = 0
        self.finished = 0
        self.failed = 0
        self.cancelled = 0
        self.sampled_tokens = 0
        self.prefill_tokens = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.steps = 0
        self.failed_steps = 0
        self.preemptions = 0
        self.step_s = {"prefill": Histogram(DURATION_BUCKETS), "decode": Histogram(DURATION_BUCKETS)}
        self.inter_token_s = Histogram(DURATION_BUCKETS)
        self.drafted_rows = 0
        self.draft_tokens = 0
        self.accepted_draft_tokens = 0
        self.skipped_tokens = Histogram(SKIPPED_BUCKETS)
        self.prefill_size = Histogram(BATCH_BUCKETS)
        self.batch_size = 0
        self.running = 0
        self.waiting = 0
        self.blocks_used = 0
        self.blocks_total = 0
        self.states_kept = 0
        self.adapters: Callable[[], tuple[list[str], list[str]]] | None = None
        self.max_adapters = 0
