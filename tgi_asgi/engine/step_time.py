"""How long a step will take: a line through the steps so far, that follows the machine as it changes."""

from __future__ import annotations

import math

_DRIFT = 0.03  # what a coefficient changes from step to step, of itself
_NOISE = 0.1  # what a step's time is off the line, of itself
_MOST_DEVIATIONS = 4.0  # a step that is further off was held up: no trend


class StepTime:
    """Model a step's time as `base + rows * row + tokens * token`; rows decode, tokens are a prompt's.

    The coefficients drift (contexts grow, neighbours on the machine come and go), so a Kalman filter of a
    random walk estimates them (Kalman 1960). Its covariance knows what steps of one size leave open, which of
    the three took the time, and the first step of another size settles it.
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
        bound_s = _MOST_DEVIATIONS * math.sqrt(variance)
        error_s = min(max(duration_s - expected_s, -bound_s), bound_s)
        for i in range(3):
            coefficients[i] = max(coefficients[i] + spread[i] / variance * error_s, 0.0)
            for j in range(3):
                covariance[i][j] -= spread[i] * spread[j] / variance

    def _begin(self, num_rows: float, num_tokens: int, duration_s: float) -> None:
        """Let the first step that has rows, or tokens, say how much they could take at the most."""
        if num_rows and not self._covariance[1][1]:
            self._covariance[0][0] = duration_s**2
            self._covariance[1][1] = (duration_s / num_rows) ** 2
        if num_tokens and not self._covariance[2][2]:
            self._covariance[2][2] = (duration_s / num_tokens) ** 2
