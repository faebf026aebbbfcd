"""Results of a benchmark, as rows of a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.commands.stream_client import Answer

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Load:
    """Results of a number of concurrent clients, each sending its next request after the previous answer.

    Attributes:
        seconds: Time from the first request to the end of the last answer.
        failures: One message for each failed request.
    """

    num_clients: int
    seconds: float
    answers: tuple[Answer, ...]
    failures: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """Return all reported figures. Times are in milliseconds; without answers they are None."""
        answers = self.answers
        num_tokens = sum(each.num_tokens for each in answers)
        num_prompt_tokens = sum(each.num_prompt_tokens for each in answers)
        per_token_s = [each.per_token_s for each in answers if each.per_token_s is not None]
        return {
            "batch_size": self.num_clients,
            "requests": len(answers),
            "failed": len(self.failures),
            "seconds": self.seconds,
            "prompt_tokens": num_prompt_tokens / len(answers) if answers else None,
            "output_tokens": num_tokens / len(answers) if answers else None,
            "time_to_first_token_ms": _spread([each.first_s for each in answers]),
            "time_per_token_ms": _spread(per_token_s),
            "pause_ms": _spread([pause for each in answers for pause in each.pauses_s]),
            "request_ms": _spread([each.end_s - each.sent_s for each in answers]),
            "output_tokens_per_s": num_tokens / self.seconds,
            "prompt_tokens_per_s": num_prompt_tokens / self.seconds,
            "requests_per_s": len(answers) / self.seconds,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that is at least `percent` per cent of all values (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def _spread(values_s: Sequence[float]) -> dict[str, float] | None:
    if not values_s:
        return None
    spread = {f"p{percent}": percentile(values_s, percent) * 1e3 for percent in _PERCENTILES}
    return {"mean": sum(values_s) / len(values_s) * 1e3, **spread}


def _of(key: str, percent: int) -> Callable[[dict[str, Any]], float | None]:
    return lambda figures: figures[key] and figures[key][f"p{percent}"]


# A table's columns: the group's title, then each column's name, width, decimals, and value.
_Column = tuple[str, int, int, Callable[[dict[str, Any]], float | None]]
_GROUPS: tuple[tuple[str, tuple[_Column, ...]], ...] = (
    ("streams", (("at once", 8, 0, lambda figures: figures["batch_size"]),)),
    (
        "first token, ms",
        (
            ("p50", 10, 1, _of("time_to_first_token_ms", 50)),
            ("p90", 9, 1, _of("time_to_first_token_ms", 90)),
            ("p99", 9, 1, _of("time_to_first_token_ms", 99)),
        ),
    ),
    (
        "each token, ms",
        (("p50", 9, 2, _of("time_per_token_ms", 50)), ("p99", 9, 2, _of("time_per_token_ms", 99))),
    ),
    ("pause, ms", (("p99", 10, 1, _of("pause_ms", 99)),)),
    (
        "tokens a second",
        (
            ("prompt", 10, 1, lambda figures: figures["prompt_tokens_per_s"]),
            ("answer", 9, 1, lambda figures: figures["output_tokens_per_s"]),
        ),
    ),
    (
        "requests",
        (
            ("answered", 9, 0, lambda figures: figures["requests"]),
            ("a second", 9, 2, lambda figures: figures["requests_per_s"]),
            ("failed", 8, 0, lambda figures: figures["failed"]),
        ),
    ),
)


def table_head() -> str:
    """Return the two header lines: groups and columns."""
    titles = "".join(f"{title:>{sum(column[1] for column in columns)}}" for title, columns in _GROUPS)
    names = "".join(f"{name:>{width}}" for _, columns in _GROUPS for name, width, _, _ in columns)
    return f"{titles}\n{names}"


def table_row(figures: dict[str, Any]) -> str:
    """Return the table row of one load."""
    cells = []
    for _, columns in _GROUPS:
        for _, width, digits, read in columns:
            value = read(figures)
            cells.append(f"{'-' if value is None else f'{value:,.{digits}f}':>{width}}")
    return "".join(cells)
