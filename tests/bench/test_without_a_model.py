"""The benchmarks that measure the server without a model: their stand-ins for its parts must still fit it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("program", "measured"),
    [
        (
            ["bench.wire", "--streams", "4", "--seconds", "0.3", "--stalled", "1"],
            {"request_us", "sent_token_us"},
        ),
        (
            ["bench.scheduler", "--sequences", "4", "--steps", "20"],
            {"scheduler_us", "engine_us", "blocked_us"},
        ),
    ],
    ids=["wire", "scheduler"],
)
def test_the_costs_without_a_model_are_measured(program: list[str], measured: set[str]) -> None:
    ended = subprocess.run([sys.executable, "-m", *program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert all(found[name] > 0 for name in measured)
