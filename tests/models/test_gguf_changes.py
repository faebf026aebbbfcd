"""Each key of a GGUF file's metadata, changed: the file is refused, or computes what llama.cpp computes.

A key that this project ignores although llama.cpp reads it, or the reverse, gives other log-probabilities.
oracle/llama-changes.json holds llama.cpp's, as recorded by oracle/record_llama_changes.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import our_logits
from tests.support.gguf_models import LLAMA, QWEN2, QWEN3_MOE, changed, make
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles

RECORDED = json.loads(Path(__file__).with_name("oracle").joinpath("llama-changes.json").read_text("utf-8"))
CASES = {case.name: case for case in (LLAMA, QWEN2, QWEN3_MOE)}
EXACT = 1e-3  # of a log-probability; correct results are within 2e-4
# llama.cpp ignores these, and models need them: Mistral's window, in files that it also calls llama, and
# whether the weights of a token's experts sum to 1.
OTHERWISE = {("llama", "attention.sliding_window"), ("qwen3moe", "expert_weights_norm")}


def difference(files: ModelFiles, ids: list[int], best: list[dict[str, float]]) -> float | None:
    """Return the largest error in log-probabilities; None if the file is refused."""
    try:
        logprobs = our_logits(files, ids).double().log_softmax(-1).numpy()[RECORDED["positions"]]
    except ModelLoadError:
        return None
    pairs = zip(logprobs, best, strict=True)
    apart = [abs(row[int(token_id)] - known) for row, found in pairs for token_id, known in found.items()]
    return float(np.nan_to_num(np.array(apart), nan=np.inf).max())


@pytest.mark.parametrize("name", CASES)
def test_changed_metadata_is_computed_as_by_llama_cpp_or_refused(name: str, tmp_path: Path) -> None:
    recorded, made = RECORDED["models"][name], make(CASES[name], tmp_path, {"*": "F32"})
    assert made.digest == recorded["file"], f"another file than recorded: run {RECORDED['recorded_by']}"
    found = {}
    for row in recorded["results"]:
        if not any((name, key) in OTHERWISE for key in row["change"]):
            files = changed(made, tmp_path, row["change"])
            found[str(row["change"])] = difference(files, made.reference.prompt_ids, row["best"])
    assert found["{}"] is not None
    assert not {change: apart for change, apart in found.items() if apart is not None and apart > EXACT}
