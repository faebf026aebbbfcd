"""A native model is served without torch, whose import takes seconds and 200 MB of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.adapters import write_adapter
from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.server_process import NEW_INTERPRETER, PLAIN_CLIENT, ServerProcess

STAND_IN = 'raise ImportError("no torch here")\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Serve a checkpoint with all that has code of its own, where an import of torch fails."""
    stand_in, base = tmp_path_factory.mktemp("modules"), tmp_path_factory.mktemp("model")
    (stand_in / "torch.py").write_text(STAND_IN, encoding="utf-8")
    save(make_model(), base)
    save_tokenizer(base)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    adapter = write_adapter(stand_in / "adapter", {module: (64, 64)})
    options = (
        "--model-id", str(base), "--lora-adapters", f"tuned={adapter}", "--pooling", "mean",
        "--speculate", "2", "--kv-cache-dtype", "auto", "--quantize", "q8_0", "--num-threads", "1",
    )  # fmt: skip
    with (
        ServerProcess(
            "tgi_asgi", *options, environ={"PYTHONPATH": str(stand_in)}, program=NEW_INTERPRETER
        ) as process,
        PLAIN_CLIENT(base_url=process.url, timeout=60) as client,
    ):
        process.wait_until_healthy()
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1, 2, 3], "echo": True, "logprobs": 2}),
        ("/v1/completions", {"prompt": [4] * 30, "model": "tuned", "temperature": 0}),
        ("/v1/completions", {"prompt": [1, 2], "n": 2, "temperature": 1, "logit_bias": {"5": 9}}),
        ("/v1/completions", {"prompt": [1, 2], "guided_regex": "[ab]{2}"}),
        ("/v1/embeddings", {"input": [[1, 2, 3]]}),
    ],
    ids=["prompt's log-probabilities", "adapter", "choices", "grammar", "embedding"],
)
def test_it_answers(server: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = server.post(path, json={"model": "tgi", "max_tokens": 4, **body})
    assert answer.status_code == 200, answer.text


def test_a_model_that_computes_in_torch_says_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(STAND_IN, encoding="utf-8")
    save(make_model("GPTJ"), tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    command = ("tgi_asgi", "--model-id", str(tmp_path / "model"))
    environ = {"PYTHONPATH": str(tmp_path)}
    with ServerProcess(*command, environ=environ, program=NEW_INTERPRETER) as process:
        assert process.wait() != 0
        assert "no torch here" in process.output()
