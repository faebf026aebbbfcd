"""How many prompt tokens a step may compute so that both running streams and prompts keep their pace."""

from __future__ import annotations

from typing import NamedTuple

from tgi_asgi.engine.step_time import StepSize, StepTime

_UNKNOWN_COST_TOKENS = 128  # size of the first prompt chunk, whose duration reveals the cost of a token
_PATIENCE_S = 1.0  # wait after which the second value of each pair below holds; interpolated before
_SHARE = (0.5, 2.5)  # minimum time for prompts, as a multiple of the step's decode time
_STRETCH = (1.0, 1.3)  # multiple of the target
# A step while nothing decodes holds up what arrives, and cannot be cancelled. One of whole prompts may be
# longer: once the first of a burst is answered, the others have only what its stream leaves. Parts of less
# than 256 tokens would spend their time on reading the weights.
_WHOLE_S = 1.0
_PART_S = 0.4
_ALONE_TOKENS = 256
_AVERAGED_STEPS = 8  # steps of one size to average, as learning takes 17 us and one step says little
# A longer step is learnt from alone: while eight of them run, the parts of a prompt become much slower.
_TELLING_S = 0.25
_PROBE_EVERY = 128  # steps, of which the first eight assume cheap drafts: see `cost_s`
_PROBED_SHARE = 0.25  # upper bound of a row's cost in those eight, as a share of a one-row step


class NextPrompt(NamedTuple):
    """The prompt to which a step's tokens go first.

    Attributes:
        num_tokens: Tokens that it computes in all its steps: those that are not cached.
        num_cached: Context length of the first of them.
        num_before: Context length of the next one.
    """

    num_tokens: int
    num_cached: float = 0
    num_before: float = 0


class TokenBudget:
    """The choice of a step's number of prompt tokens, from the durations of earlier steps.

    Prompts get the time that decoding leaves of the target, and at least half as long as decoding takes: if
    decoding alone misses the target, the streams are late anyway and starving prompts would not help them.
    Both limits grow with a prompt's wait, to 1.3 times the target and 2.5 times the decode time within a
    second. When many requests arrive at once, all of them are answered soon, and running streams slow down
    until then. While nothing decodes, a step takes about 0.4 s at most if the next prompt needs more than a
    second, else a second at most; or as long as 256 tokens take.

    Args:
        min_tokens: Least number of prompt tokens in a step, at least a block; fewer would take as long.
    """

    __slots__ = (
        "_block_size",
        "_limit",
        "_max_tokens",
        "_min_tokens",
        "_num_due",
        "_num_pending_drafts",
        "_num_pending_pairs",
        "_num_steps",
        "_pending_s",
        "_size",
        "_target_s",
        "_time",
    )

    def __init__(self, *, max_tokens: int, block_size: int, target_s: float, min_tokens: int = 0) -> None:
        self._max_tokens = max_tokens
        self._min_tokens = max(min_tokens, block_size)
        self._limit = max_tokens  # smaller after a step that ran out of memory
        self._block_size = block_size
        self._target_s = target_s
        self._time = StepTime()
        self._size = (0.0, 0.0)  # of the last step: decode rows, prompt tokens
        self._pending_s: list[float] = []  # durations of steps of that size that are not learnt from yet
        self._num_pending_drafts = 0
        self._num_pending_pairs = 0.0
        self._num_due = 1  # steps of this size to average before learning
        self._num_steps = 0

    def tokens(self, num_decode_rows: int, prompt: NextPrompt, waited_s: float = 0.0) -> int:
        """Return how many prompt tokens the next step may compute: whole blocks, or the maximum.

        Never zero, so that prompts always advance.

        Args:
            waited_s: How long the next prompt has waited.
        """
        return min(self._wanted(num_decode_rows, prompt, waited_s), self._limit)

    def _wanted(self, num_decode_rows: int, prompt: NextPrompt, waited_s: float) -> int:
        if not self._time.knows_prompts:
            return min(max(_UNKNOWN_COST_TOKENS, self._min_tokens), self._max_tokens)
        if num_decode_rows == 0:
            whole_s = self._time.prompt_s(prompt.num_tokens, prompt.num_cached)
            spare_s = _WHOLE_S if whole_s <= _WHOLE_S else _PART_S
            least = max(_ALONE_TOKENS, self._min_tokens)
        else:
            spare_s, least = self.spare_s(num_decode_rows, waited_s), self._min_tokens
        if self._time.prompt_s(self._max_tokens, prompt.num_before) <= spare_s:
            return self._max_tokens
        tokens = int(self._time.prompt_tokens(spare_s, prompt.num_before))
        return min(max(tokens - tokens % self._block_size, least), self._max_tokens)

    def spare_s(self, num_decode_rows: int, waited_s: float = 0.0) -> float:
        """Return how long the next step may take in addition to its decoding."""
        decode_s = self._time.predict_s(StepSize(num_decode_rows, 0))
        patience = min(max(waited_s, 0.0) / _PATIENCE_S, 1.0)
        share, stretch = (first + patience * (last - first) for first, last in (_SHARE, _STRETCH))
        return max(self._target_s * stretch - decode_s, decode_s * share)

    @property
    def cost_s(self) -> tuple[float, float]:
        """Seconds of a decode step: the fixed part, and the part per token; zeros while nothing is known.

        If a few delayed steps made rows look expensive, no row would get drafts and no step could show that
        they are cheap. A few steps now and then therefore assume that rows are cheap, and correct the model.
        """
        whole = self._time.predict_s(StepSize(1, 0))
        row = whole - self._time.predict_s(StepSize(0, 0))
        if self._num_steps % _PROBE_EVERY < _AVERAGED_STEPS:
            row = min(row, _PROBED_SHARE * whole)
        return whole - row, row

    def observe(self, size: StepSize, duration_s: float, *, num_drafts: int = 0) -> None:
        """Learn from a step that took `duration_s`: at once if it is long or its size new, else every eighth.

        A draft costs as much as a row. Other numbers of drafts, or of pairs, do not count as a new size,
        because they change with every step.

        Args:
            size: Of the step, without its drafts.
        """
        self._num_steps += 1
        if size[:2] != self._size:
            self._size = size[:2]
            self._start_average(1)
        self._pending_s.append(duration_s)
        self._num_pending_drafts += num_drafts
        self._num_pending_pairs += size.num_pairs
        count = len(self._pending_s)
        if count >= self._num_due:
            num_rows = size.num_rows + self._num_pending_drafts / count
            mean = StepSize(num_rows, size.num_tokens, self._num_pending_pairs / count)
            self._time.observe(mean, sum(self._pending_s) / count)
            self._start_average(1 if duration_s > _TELLING_S else _AVERAGED_STEPS)
        if size.num_tokens:
            self._limit = min(self._limit + self._block_size, self._max_tokens)

    def shrink(self, num_prefill_tokens: int) -> None:
        """Limit steps to half as many prompt tokens after one ran out of memory; the limit grows again."""
        self._limit = max(min(self._limit, num_prefill_tokens // 2), self._block_size)

    def _start_average(self, num_steps: int) -> None:
        """Learn next from the average of `num_steps` steps of the present size."""
        self._num_due = num_steps
        self._pending_s.clear()
        self._num_pending_drafts = 0
        self._num_pending_pairs = 0.0

    def predict_s(self, size: StepSize) -> float:
        """Return how long a step is expected to take; 0 while nothing is known."""
        return self._time.predict_s(size)
