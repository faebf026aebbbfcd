"""Counters that the engine fills and the metrics routes read. Plain numbers, used from one thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

# Upper bounds of histograms, here and in the metrics; the same as TGI's.
DURATION_BUCKETS = tuple(0.0001 * 1.5**k for k in range(1, 36))  # seconds: 0.15 ms to 145.6 s
BATCH_BUCKETS = tuple(float(size) for size in range(1, 1025))


class Histogram:
    """Counts of values by upper bound, as in Prometheus; the last count is for values above all bounds."""

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
    """The engine's counters since it started, gauges of what it holds now, and a function for its adapters.

    Attributes:
        accepted, finished, failed, cancelled: Requests; accepted = finished + failed + cancelled + open.
        sampled_tokens: Tokens delivered.
        prefill_tokens: Prompt tokens computed.
        prefix_query_tokens, prefix_hit_tokens: Prompt tokens looked up in the prefix cache, and found there.
        steps, failed_steps, preemptions: Number of each.
        step_s: Durations of steps, by "prefill" (some prompt tokens) and "decode" (none).
        inter_token_s: Time between two tokens of a sequence, one value per token.
        prefill_size: Number of sequences in prefill, per step that has any.
        drafted_rows, draft_tokens, accepted_draft_tokens: Rows with drafts, drafts, and accepted drafts.
        skipped_tokens: Tokens that a row sampled beyond its first, per row that sampled one; mostly 0.
        compute_threads: CPU threads that computed last.
        running, waiting: Sequences with a slot, and without.
        blocks_used, blocks_total: Blocks of the KV cache.
        states_kept: Kept states that prompts can resume from, for models with recurrent layers.
        adapters: Function that returns the names of the adapters of running and of waiting requests. It is
            called when metrics are read, not in each step. None: no adapters are served.
        max_adapters: Maximum number of different adapters in a step.
    """

    __slots__ = (
        "accepted", "accepted_draft_tokens", "adapters", "blocks_total", "blocks_used",
        "cancelled", "compute_threads", "draft_tokens", "drafted_rows", "failed", "failed_steps", "finished",
        "inter_token_s", "max_adapters", "preemptions", "prefill_size", "prefill_tokens",
        "prefix_hit_tokens", "prefix_query_tokens", "running", "sampled_tokens", "skipped_tokens",
        "states_kept", "step_s", "steps", "waiting",
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
        self.skipped_tokens = Histogram(())
        self.prefill_size = Histogram(BATCH_BUCKETS)
        self.compute_threads = 0
        self.running = 0
        self.waiting = 0
        self.blocks_used = 0
        self.blocks_total = 0
        self.states_kept = 0
        self.adapters: Callable[[], tuple[list[str], list[str]]] | None = None
        self.max_adapters = 0
