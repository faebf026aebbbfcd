"""Compare an encoder-decoder of T5-base's shape with `generate` of transformers, interleaved in one process.

    python -m bench.encoder_decoder [--quantize Q8_0] [--rounds 3]

The weights are random (0.25 billion, bfloat16 in the file). Prints the milliseconds to the first token of an
answer to 300 tokens, and for each further token of eight answers and of one: the median of the rounds, with
the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.generic import seconds
from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.steps import flat_rows
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.system import num_processors

_CONTEXT, _PROMPT, _TOKENS, _ANSWERS = 512, 300, 32, 8
_Times = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quantize")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder))
        contenders: dict[str, Callable[[], _Times]] = {
            f"this server, {arguments.quantize or 'bfloat16'}": _ours(Path(folder), arguments.quantize)
        }
        model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        contenders["transformers, float32"] = partial(_theirs, model.eval())
    turns: dict[str, list[_Times]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds + 1):
        for name, run in contenders.items():
            turns[name].append(run())
    for name, found in turns.items():
        for what in found[0]:
            times = [1e3 * each[what] for each in found[1:]]
            spread = f"({min(times):.1f}..{max(times):.1f})"
            print(f"{name:<24} {what:<12} {statistics.median(times):7.1f} ms {spread}")


def _make(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.tie_word_embeddings = False
    model: Any = transformers.T5ForConditionalGeneration(config)
    model.generation_config.update(decoder_start_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)


def _prompts() -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(3, 32000, _PROMPT) for seed in range(_ANSWERS)]


def _ours(folder: Path, quantise: str | None) -> Callable[[], _Times]:
    ops.configure_threads(None)
    ops.join_threads()
    with OpenModel(ModelFiles("bench", None, "directory", folder), model_impl="transformers") as opened:
        model = opened.load(ops.Packing(False, quantise), _CONTEXT)
    assert isinstance(model, GenericModel)
    program, width = model.program([], _CONTEXT), _CONTEXT // 16

    def run() -> _Times:
        torch.set_num_threads(1)  # its threads would compete with the team
        times: _Times = {}
        for slot, prompt in enumerate(_prompts()):
            program.start(slot, prompt.tolist(), ())
            batch = flat_rows([(slot, prompt, 0)], width)
            times["first token"] = seconds(partial(program.run, batch, [_PROMPT - 1]))
        at = _PROMPT
        for count in (_ANSWERS, 1):
            began = time.perf_counter()
            for position in range(at, at + _TOKENS):
                rows = [(slot, np.array([5]), position) for slot in range(count)]
                program.run(flat_rows(rows, width), list(range(count)))
            times[f"decode x{count}"] = (time.perf_counter() - began) / _TOKENS
            at += _TOKENS
        return times

    return run


def _theirs(model: Any) -> _Times:
    torch.set_num_threads(num_processors())
    ids = torch.from_numpy(np.stack(_prompts()))
    times: _Times = {}
    for count in (_ANSWERS, 1):
        first, whole = (
            seconds(partial(
                model.generate, ids[:count], max_new_tokens=length, min_new_tokens=length, do_sample=False
            ))
            for length in (1, 1 + _TOKENS)
        )  # fmt: skip
        if count == 1:
            times["first token"] = first
        times[f"decode x{count}"] = (whole - first) / _TOKENS
    return times


if __name__ == "__main__":
    main()
