"""Record the errors of llama.cpp against float32 on the files of tests/models/test_gguf_formats.py.

    CMAKE_ARGS="-DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF" pip install llama-cpp-python==0.3.36
    python tests/models/oracle/record_llama_errors.py tests/models/oracle/llama-errors.json

llama.cpp runs on one thread of the CPU, once with its defaults and once with keys and values in bfloat16. The
reference is the test's own: `transformers` in float32 on the decoded weights. The output records the mean,
the 99th percentile and the largest difference between log-probabilities, at all positions and over the whole
vocabulary, and the file's hash.
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

from tests.support.gguf_blocks import FORMATS
from tests.support.gguf_models import LLAMA, QWEN2, MadeModel, make

CACHES = {"float16": gguf.GGMLQuantizationType.F16, "bfloat16": gguf.GGMLQuantizationType.BF16}


def errors_of(made: MadeModel, cache: gguf.GGMLQuantizationType) -> dict[str, float]:
    """Return the errors of llama.cpp with a cache of this type."""
    ids = made.reference.all_ids
    model = llama_cpp.Llama(
        str(made.files.path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False,
        type_k=int(cache), type_v=int(cache),
    )  # fmt: skip
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], np.float64)
    model.close()
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    apart = np.abs(logprobs - made.reference.logprobs)
    return {"mean": float(apart.mean()), "p99": float(np.quantile(apart, 0.99)), "max": float(apart.max())}


def main() -> None:
    """Record all formats except Q8_1, which llama.cpp only uses for activations."""
    found: dict[str, Any] = {}
    for case in (LLAMA, QWEN2):
        found[case.name] = {}
        for format in (name for name in FORMATS if name != "Q8_1"):
            with tempfile.TemporaryDirectory() as folder:
                made = make(case, Path(folder), {"*": format})
                row = {name: errors_of(made, cache) for name, cache in CACHES.items()}
            found[case.name][format] = {"file": made.digest, **row}
            print(case.name, format, row, flush=True)
    features = llama_cpp.llama_print_system_info().decode()
    result = {
        "recorded_by": "tests/models/oracle/record_llama_errors.py",
        "llama-cpp-python": llama_cpp.__version__,
        "cpu": features.strip(),
        "errors": found,
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
