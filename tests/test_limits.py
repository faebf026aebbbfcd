"""docs/limits.md against the code: a limit that changes must change there, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgi_asgi.serve import server
from tgi_asgi.engine import engine, loop, sequence
from tgi_asgi.http import asgi, openai_params, sse, tgi_schema, tgi_validation
from tgi_asgi.settings import MIB, Settings
from tgi_asgi.text.chat import sandbox, template_limits, time_limit

TEXT = (Path(__file__).parents[1] / "docs" / "limits.md").read_text(encoding="utf-8")
OPENAI, COMPAT = (openai_params.Limits.of(Settings(tgi_compat=is_compat)) for is_compat in (False, True))


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ("request line and headers", [64 << 10]),
        ("open connections", [server.MAX_FILES]),
        ("silence on a connection", [server.KEEP_ALIVE_S]),
        ("time for a request's body", [asgi.BODY_TIMEOUT_S]),
        ("a reader that lags", [sse.MAX_WAITING_EVENTS, sse.STALL_LIMIT_S]),
        ("size", [Settings().payload_limit // MIB]),
        ("`n`, `best_of`", [OPENAI.best_of, COMPAT.best_of]),
        ("prompts of a call", [OPENAI.prompts, COMPAT.prompts]),
        ("prompts times choices", [OPENAI.choices]),
        ("stop strings", [OPENAI.stops, tgi_schema.DEFAULT_MAX_STOP_SEQUENCES]),
        ("length of a stop string", [tgi_validation.MAX_STOP_CHARS]),
        ("`stop_token_ids`", [openai_params.MAX_IDS]),
        ("`logit_bias` entries", [openai_params.MAX_IDS]),
        ("top log-probabilities", [OPENAI.top_logprobs, tgi_schema.DEFAULT_MAX_TOP_N_TOKENS]),
        (
            "what a chat template makes",
            [template_limits.MAX_CHARS, sandbox.MAX_RANGE, int(time_limit.MAX_CPU_S)],
        ),
        ("choices that run and wait", [Settings().max_concurrent_requests]),
        ("sequences of a step", [Settings().max_batch_size]),
        ("a step's time", [Settings().step_timeout_s]),
    ],
)
def test_the_page_has_each_limit_as_it_is(row: str, values: list[float]) -> None:
    [line] = [line for line in TEXT.splitlines() if line.startswith(f"| {row}")]
    for value in values:
        assert f" {int(value):,}" in line


def test_the_page_has_the_figures_of_its_sentences_as_they_are() -> None:
    assert f"at most {loop._MAX_DELAY_S * 1000:.0f} ms" in TEXT
    assert f"{sequence.AGING_S:.0f} s of waiting" in TEXT
    assert f"{engine._EAGER_BYTES // MIB} MiB are filled" in " ".join(TEXT.split())
