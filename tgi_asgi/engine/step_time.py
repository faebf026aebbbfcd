"""Predict a step's duration with a linear model that follows the machine as it changes."""

from __future__ import annotations

import math
from typing import NamedTuple

_DRIFT = 0.03  # random relative change of a coefficient from step to step
_NOISE = 0.1  # random relative deviation of a step's time from the line
_MAX_DEVIATIONS = 4.0  # a step further off was delayed and shows no trend
# Upper bound of a pair's cost, as a share of a token's, until steps show it: a token's products have as many
# operations as the pairs of 6 times the model's width, but attention computes fewer operations a second.
_MAX_PAIR = 1e-3


class StepSize(NamedTuple):
    """What a step computes.

    Attributes:
        num_rows: Decode rows, drafts included.
        num_tokens: Prompt tokens.
        num_pairs: Pairs of a prompt token and a token before it, whose key and value it reads.
    """

    num_rows: float
    num_tokens: float
    num_pairs: float = 0.0


class StepTime:
    """A model of a step's time, `base + rows * row + tokens * token + pairs * pair`: see `StepSize`.

    The coefficients drift (contexts grow, other load on the machine comes and goes), so a Kalman filter of a
    random walk estimates them (Kalman 1960). Steps of one size leave open which of the terms took the time;
    the covariance records that, and the first step of another size resolves it.
    """

    __slots__ = ("_coefficients", "_covariance")

    def __init__(self) -> None:
        self._coefficients = [0.0] * 4
        self._covariance = [[0.0] * 4 for _ in range(4)]

    @property
    def knows_prompts(self) -> bool:
        """Whether a step with prompt tokens has been observed."""
        return self._covariance[2][2] > 0.0

    def predict_s(self, size: StepSize) -> float:
        """Return the seconds that a step is expected to take; 0 while nothing is known."""
        base, row, token, pair = self._coefficients
        return base + size.num_rows * row + size.num_tokens * token + size.num_pairs * pair

    def prompt_s(self, num_tokens: float, num_before: float) -> float:
        """Return the seconds that `num_tokens` of a prompt add to a step if `num_before` come before them."""
        _, _, token, pair = self._coefficients
        return num_tokens * (token + pair * (num_before + num_tokens / 2))

    def prompt_tokens(self, added_s: float, num_before: float) -> float:
        """Return how many tokens of a prompt add `added_s` to a step: the inverse of `prompt_s`."""
        _, _, token, pair = self._coefficients
        first = token + pair * num_before  # cost of the first of them
        root = first + math.sqrt(first**2 + 2 * pair * added_s)
        return 2 * added_s / root if root else math.inf

    def observe(self, size: StepSize, duration_s: float) -> None:
        """Learn from a step."""
        self._begin(size, duration_s)
        covariance, coefficients = self._covariance, self._coefficients
        for i in range(4):
            covariance[i][i] += (_DRIFT * coefficients[i]) ** 2
        sizes = (1.0, float(size.num_rows), float(size.num_tokens), float(size.num_pairs))
        spread = [sum(map(float.__mul__, row, sizes)) for row in covariance]
        expected_s = self.predict_s(size)
        noise_s = _NOISE * min(expected_s or duration_s, duration_s)
        variance = sum(map(float.__mul__, spread, sizes)) + noise_s**2
        if variance <= 0.0:
            return
        bound_s = _MAX_DEVIATIONS * math.sqrt(variance)
        error_s = min(max(duration_s - expected_s, -bound_s), bound_s)
        for i in range(4):
            coefficients[i] = max(coefficients[i] + spread[i] / variance * error_s, 0.0)
            for j in range(4):
                covariance[i][j] -= spread[i] * spread[j] / variance

    def _begin(self, size: StepSize, duration_s: float) -> None:
        """Take the variance of each term from the first step with rows, or tokens: an upper bound."""
        covariance = self._covariance
        if size.num_rows and not covariance[1][1]:
            covariance[0][0] = duration_s**2
            covariance[1][1] = (duration_s / size.num_rows) ** 2
        if size.num_tokens and not covariance[2][2]:
            token_s = duration_s / size.num_tokens
            covariance[2][2] = token_s**2
            covariance[3][3] = (_MAX_PAIR * token_s) ** 2
