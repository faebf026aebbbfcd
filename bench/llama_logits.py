"""Write llama.cpp's logits of given tokens; run by an interpreter with llama-cpp-python, not the project's.

    python llama_logits.py model.gguf texts.json folder num_threads

texts.json is a list of lists of token ids; folder/<index>.npy receives float32 [n_tokens, vocab]. Prompts are
computed in batches, as llama.cpp's server computes them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main(gguf: str, texts: str, folder: str, num_threads: str) -> None:
    """Evaluate every text from an empty context."""
    wanted = json.loads(Path(texts).read_text())
    model = Llama(
        gguf,
        n_ctx=max(map(len, wanted)),
        n_threads=int(num_threads),
        n_threads_batch=int(num_threads),
        logits_all=True,
        verbose=False,
    )
    for index, ids in enumerate(wanted):
        model.reset()
        model.eval(ids)
        np.save(Path(folder) / f"{index}.npy", model.scores[: len(ids)])


if __name__ == "__main__":
    main(*sys.argv[1:])
