"""Predict a step's duration with a linear model that follows the machine as it changes."""

from __future__ import annotations

import math

_DRIFT = 0.03  # random relative change of a coefficient from step to step
_NOISE = 0.1  # random relative deviation of a step's time from the line
_MAX_DEVIATIONS = 4.0  # a step further off was delayed and shows no trend


class StepTime:
    """A model of a step's time, `base + rows * row + tokens * token`, for decode rows and prompt tokens.

    The coefficients drift (contexts grow, other load on the machine comes and goes), so a Kalman filter of a
    random walk estimates them (Kalman 1960). Steps of one size leave open which of the three terms took the
    time; the covariance records that, and the first step of another size resolves it.
    """

    __slots__ = ("_coefficients", "_covariance")

    def __init__(self) -> None:
        self._coefficients = [0.0, 0.0, 0.0]
        self._covariance = [[0.0] * 3 for _ in range(3)]

    @property
    def token_s(self) -> float | None:
        """Seconds that a prompt token adds to a step; None before the first prompt."""
        return self._coefficients[2] if self._covariance[2][2] else None

    def predict_s(self, num_rows: float, num_tokens: int) -> float:
        """Return the seconds that a step is expected to take; 0 while nothing is known."""
        base, row, token = self._coefficients
        return base + num_rows * row + num_tokens * token

    def observe(self, num_rows: float, num_tokens: int, duration_s: float) -> None:
        """Learn from a step."""
        self._begin(num_rows, num_tokens, duration_s)
        covariance, coefficients = self._covariance, self._coefficients
        for i in range(3):
            covariance[i][i] += (_DRIFT * coefficients[i]) ** 2
        sizes = (1.0, float(num_rows), float(num_tokens))
        spread = [sum(map(float.__mul__, row, sizes)) for row in covariance]
        expected_s = self.predict_s(num_rows, num_tokens)
        noise_s = _NOISE * min(expected_s or duration_s, duration_s)
        variance = sum(map(float.__mul__, spread, sizes)) + noise_s**2
        if variance <= 0.0:
            return
        bound_s = _MAX_DEVIATIONS * math.sqrt(variance)
        error_s = min(max(duration_s - expected_s, -bound_s), bound_s)
        for i in range(3):
            coefficients[i] = max(coefficients[i] + spread[i] / variance * error_s, 0.0)
            for j in range(3):
                covariance[i][j] -= spread[i] * spread[j] / variance

    def _begin(self, num_rows: float, num_tokens: int, duration_s: float) -> None:
        """Take the variance of each term from the first step with rows, or tokens: an upper bound."""
        if num_rows and not self._covariance[1][1]:
            self._covariance[0][0] = duration_s**2
            self._covariance[1][1] = (duration_s / num_rows) ** 2
        if num_tokens and not self._covariance[2][2]:
            self._covariance[2][2] = (duration_s / num_tokens) ** 2
