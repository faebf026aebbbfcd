"""Bounds the reasoning of a choice: when its budget is used up, the tokens of its end are forced."""

from __future__ import annotations

import dataclasses

from tgi_asgi.types import ReasoningBudget, SamplingParams

_FORCE = 1e9  # a bias that outweighs any logit


class ReasoningWatch:
    """How much of its budget a choice has used, and whether it is inside a reasoning section."""

    __slots__ = ("_budget", "_end_ids", "_is_inside", "_left", "_num_forced", "_num_matched")

    def __init__(self, budget: ReasoningBudget) -> None:
        self._budget = budget
        self._end_ids = budget.end_ids
        self._left = budget.num_tokens
        self._is_inside = budget.is_open
        self._num_matched = 0  # how many tokens of the start mark the newest tokens are
        self._num_forced = 0  # how many tokens of the end have been forced, while others must follow

    @property
    def forced_id(self) -> int | None:
        """The token that must come next, or None."""
        if self._num_forced or (self._is_inside and self._left <= 0):
            return self._end_ids[self._num_forced]
        return None

    def push(self, token_id: int) -> bool:
        """Process the next token; return whether `forced_id` has changed."""
        before = self.forced_id
        if token_id == before:
            self._is_inside = False
            self._num_forced = (self._num_forced + 1) % len(self._end_ids)
            if not self._num_forced:
                self._end_ids = self._budget.end_ids + self._budget.answer_ids
        elif self._num_forced:  # a grammar forbids the rest of the end
            self._num_forced = 0
        elif self._is_inside:
            self._is_inside = token_id not in (self._end_ids[0], self._budget.call_id)
            self._left -= self._is_inside
        else:
            self._match(token_id)
        return self.forced_id != before

    def _match(self, token_id: int) -> None:
        start = self._budget.start_ids
        if token_id != start[self._num_matched]:
            self._num_matched = 0
        if token_id == start[self._num_matched]:
            self._num_matched += 1
        if self._num_matched == len(start):
            self._num_matched = 0
            self._is_inside = True


def force(sampling: SamplingParams, token_id: int) -> SamplingParams:
    """Return parameters with which this token is sampled, unless a grammar forbids it."""
    bias = (pair for pair in sampling.logit_bias if pair[0] != token_id)
    return dataclasses.replace(sampling, temperature=0.0, logit_bias=(*bias, (token_id, _FORCE)))
