"""Record llama.cpp's log-probabilities for GGUF files with changed metadata, for test_gguf_changes.py.

    CMAKE_ARGS="-DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF" pip install llama-cpp-python==0.3.36
    python tests/models/oracle/record_llama_changes.py tests/models/oracle/llama-changes.json

The output has the most probable tokens at a few positions, for each change that llama.cpp accepts. Sizes that
do not fit the tensors are not among the changes: they end its process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from tests.support.family_case import FamilyCase
from tests.support.gguf_models import LLAMA, QWEN2, QWEN3_MOE, changed, make
from tgi_asgi.formats.sources import ModelFiles

POSITIONS = (3, 60, 199)
NUM_BEST = 5
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
_OF_ALL: tuple[dict[str, Any], ...] = (
    {}, {"rope.freq_base": 500.0}, {"rope.freq_base": None}, {"attention.layer_norm_rms_epsilon": 0.5},
    {"attention.head_count_kv": None}, {"vocab_size": None}, {"attention.sliding_window": 8},
    {"rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}, {"rope.scaling.factor": 0.0},
    {"rope.scaling.type": "linear", "rope.scaling.factor": 0.5}, {"rope.scaling.attn_factor": 1.7},
    {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.7},
    {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.7}, {"rope.scaling.finetuned": True},
    _YARN, {**_YARN, "rope.scaling.original_context_length": None}, {**_YARN, "rope.freq_base": 500.0},
    {**_YARN, "rope.scaling.attn_factor": 1.7}, {**_YARN, "rope.scaling.finetuned": False},
    {**_YARN, "rope.scaling.yarn_attn_factor": 0.878, "rope.scaling.yarn_ext_factor": 0.5},
    {"logit_scale": 0.5}, {"embedding_scale": 3.0}, {"residual_scale": 0.5}, {"attention.scale": 0.5},
    {"attention.clamp_kqv": 0.5}, {"attn_logit_softcapping": 5.0}, {"final_logit_softcapping": 3.0},
    {"attention.causal": False}, {"use_parallel_residual": False},
)  # fmt: skip
_OF_EXPERTS: tuple[dict[str, Any], ...] = (
    {"expert_used_count": 1}, {"expert_used_count": 3}, {"expert_weights_scale": 2.5},
    {"expert_weights_norm": True}, {"expert_weights_norm": False}, {"expert_gating_func": 1},
    {"expert_gating_func": 2}, {"expert_group_count": 2, "expert_group_used_count": 1},
    {"expert_shared_count": 1}, {"leading_dense_block_count": 1}, {"expert_feed_forward_length": None},
)  # fmt: skip
CASES = ((LLAMA, _OF_ALL), (QWEN2, _OF_ALL), (QWEN3_MOE, _OF_ALL + _OF_EXPERTS))


def best_of(files: ModelFiles, ids: list[int]) -> list[dict[str, float]] | None:
    """Return the best tokens at `POSITIONS`; None if llama.cpp refuses the file."""
    floats = int(gguf.GGMLQuantizationType.F32)
    try:
        model = llama_cpp.Llama(
            str(files.path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False,
            type_k=floats, type_v=floats,
        )  # fmt: skip
    except ValueError:
        return None
    model.eval(ids)
    logits = np.array(model.scores, np.float64)[list(POSITIONS)]
    model.close()
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    best = np.argsort(-logprobs, axis=1)[:, :NUM_BEST]
    return [
        {str(at): round(float(row[at]), 5) for at in ats} for row, ats in zip(logprobs, best, strict=True)
    ]


def record(case: FamilyCase, changes: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return the results of one model's file with each change."""
    with tempfile.TemporaryDirectory() as folder:
        made = make(case, Path(folder), {"*": "F32"})
        ids = made.reference.prompt_ids
        found = [(each, best_of(changed(made, Path(folder), each), ids)) for each in changes]
    rows = [{"change": each, "best": best} for each, best in found if best is not None]
    return {"file": made.digest, "results": rows}


def main() -> None:
    """Record all changes."""
    result = {
        "recorded_by": "tests/models/oracle/record_llama_changes.py",
        "llama-cpp-python": llama_cpp.__version__,
        "positions": POSITIONS,
        "models": {case.name: record(case, changes) for case, changes in CASES},
    }
    Path(sys.argv[1]).write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
