"""Architectures that `transformers` computes, over HTTP: several prompts at once, scored and continued.

The normal run covers one architecture for each tier and kind; `make test-models` covers all that are served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support import architectures
from tests.support import generic_table as table
from tests.support.live_server import LiveServer
from tgi_asgi.app import App, create_app
from tgi_asgi.settings import Settings

USUAL = ["gemma2", "deepseek_v3", "deepseek_v32", "bloom", "lfm2", "zamba2", "bart", "openai-gpt", "qwen3"]
EQUAL = 1e-3  # of a log-probability; most are within 1e-5
LENGTHS = (33, 9, 21)  # of prompts, of which a step computes `STEP_TOKENS`
NUM_TOKENS, STEP_TOKENS, MAX_TOKENS = 5, 16, 48
START_TIMEOUT_S = 120.0

SERVED = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.models)
    for name in architectures.servable()
    if table.tier_of(name) != "refused"
]


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[httpx.Client]:
    """Serve a checkpoint with the code of `transformers`; yield a client once it is loaded."""
    apps: list[App] = []

    def make() -> App:
        usual: dict[str, Any] = {
            "model_impl": "transformers",
            "dtype": "float32",
            "num_threads": 1,
            "thread_nice": 0,
            "max_batch_size": 4,
            "max_batch_prefill_tokens": STEP_TOKENS,
            "max_total_tokens": MAX_TOKENS,
        }
        apps.append(create_app(Settings(model_id=str(folder), **(usual | settings))))
        return apps[0]

    with LiveServer(make) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while client.get("/health").status_code != 200:
            assert apps[0].context.failure is None, apps[0].context.failure
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        yield client


def complete(client: httpx.Client, prompt: list[int]) -> Any:
    body = {
        "model": "any",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    body["return_token_ids"] = True
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def log_probabilities(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Return the log-probability of each token except the first, given the preceding ones."""
    wide = logits[:-1].astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    found: np.ndarray = wide[range(len(wide)), ids[1:]] - np.log(np.exp(wide).sum(-1))
    return found


@pytest.mark.parametrize("model_type", SERVED)
def test_prompts_and_answers_have_the_log_probabilities_of_transformers(
    model_type: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(model_type)
    asked = architectures.clear_prompts(folder, LENGTHS, NUM_TOKENS)
    references = architectures.references(folder, [prompt + answer for prompt, answer in asked])
    with serving(folder) as client, ThreadPoolExecutor(len(asked)) as threads:
        assert client.get("/info").json()["model_impl"] == "transformers"
        found = list(threads.map(lambda each: complete(client, each[0]), asked))
    for choice, (prompt, answer), logits in zip(found, asked, references, strict=True):
        expected = log_probabilities(logits, prompt + answer)
        first, *scores = choice["logprobs"]["token_logprobs"]
        assert first is None
        assert choice["token_ids"] == answer
        assert np.abs(np.array(scores) - expected).max() < EQUAL
