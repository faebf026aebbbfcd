"""Each kernel set that this machine can run, selected by TGI_ISA, serves the default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.server_process import NEW_INTERPRETER, PLAIN_CLIENT, ServerProcess
from tgi_asgi import _C

# Integer arithmetic only (weight codes, an int8 KV cache), so that all sets compute the same logits.
INTEGERS = (
    "--prompt-precision", "int8", "--kv-cache-dtype", "int8", "--max-batch-total-tokens", "4096"
)  # fmt: skip
PROMPT = "The capital of France is"
SETS = [name for name in _C.kernel_sets() if name != "amx_model"]  # AMX's software model takes minutes


def answer_of(name: str) -> Any:
    """Return the text that a server with this kernel set generates, with its log-probabilities."""
    command = ("tgi_asgi", "--hostname", "127.0.0.1", *INTEGERS)
    with ServerProcess(*command, environ={"TGI_ISA": name}, program=NEW_INTERPRETER) as server:
        server.wait_until_healthy()
        assert f"on cpu ({name})" in server.output()
        with PLAIN_CLIENT(base_url=server.url, timeout=120) as client:
            assert client.get("/info").json()["kernel_set"] == name
            asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3}
            answer = client.post("/v1/completions", json=asked)
            assert answer.status_code == 200
            choice = answer.json()["choices"][0]
            return choice["text"], choice["logprobs"]


@pytest.fixture(scope="module")
def portable(demo_gguf: Path) -> Any:
    """Return the answer of the kernels in plain C++."""
    return answer_of("portable")


def test_plain_kernels_give_a_sensible_text(portable: Any) -> None:
    text, logprobs = portable
    assert "Paris" in text
    assert len(logprobs["tokens"]) == 12


@pytest.mark.parametrize("name", [name for name in SETS if name != "portable"])
def test_each_set_serves_the_default_model_alike(name: str, portable: Any) -> None:
    (text, found), (expected_text, expected) = answer_of(name), portable
    assert (text, found["tokens"]) == (expected_text, expected["tokens"])
    # Logits are bitwise equal; the sum of their exponentials is not.
    assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=2e-6)
