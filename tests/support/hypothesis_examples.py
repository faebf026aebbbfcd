"""Hypothesis tests whose number of examples is known only when the test runs."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy


def for_all(num_examples: int, *strategies: SearchStrategy[object]) -> Callable[[Callable[..., None]], None]:
    """Run the decorated function immediately, for this number of examples.

    def test_it_is_read(scale: Scale) -> None:
        @for_all(scale(300, 20_000), st.binary())
        def check(data: bytes) -> None:
            read(data)
    """

    def run(check: Callable[..., None]) -> None:
        settings(max_examples=num_examples, suppress_health_check=list(HealthCheck))(
            given(*strategies)(check)
        )()

    return run
