"""The distance of fast arithmetic from float32: teacher-forced log-probabilities and KL divergence.

    python -m bench.quality [--model-id model.gguf] [--llama-python python --llama-dir llama.cpp/build/bin]

The oracle is transformers in float32 with eager attention on the exactly dequantised weights
(bench.export_checkpoint). All contenders get the same tokens: the golden cases of tests/models/oracle, which
are prompts and greedy continuations of the default model, and texts that the model itself sampled at
temperature 1. For every position except a text's first it computes the error |log p(token) - oracle's log
p(token)| and KL(oracle || contender) over the whole vocabulary, both in float64. llama.cpp's logits come from
llama-cpp-python, in any interpreter that has it (--llama-dir makes it load that build), so nothing is cut off
or rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.export_checkpoint import export
from bench.peer_models import requantised
from bench.report import command_line, emit, machine, table
from bench.servers import ROOT
from bench.teacher import Teacher
from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.settings import DEMO_MODEL, Settings

GOLDEN = ROOT / "tests" / "models" / "oracle" / "smollm2-135m.json"
SAMPLED_FROM = ("raw", "single", "chat", "chat-turns", "code")  # golden prompts that are continued at random
Texts = list[tuple[str, list[int]]]  # (kind, token ids)


@dataclass(slots=True)
class Errors:
    """The collected errors of one contender."""

    logprob: list[Tensor] = field(default_factory=list)  # per text [n - 1]
    divergence: list[Tensor] = field(default_factory=list)
    is_same_best: list[Tensor] = field(default_factory=list)

    def add(self, oracle: Tensor, logits: Tensor, ids: Sequence[int]) -> None:
        """Compare one text's logits [n, vocab] with the oracle's, some rows at a time."""
        following = torch.tensor(ids[1:])
        for start in range(0, len(following), 128):
            rows = slice(start, min(start + 128, len(following)))
            expected = oracle[rows].double().log_softmax(-1)
            found = logits[rows].double().log_softmax(-1)
            tokens = following[rows, None]
            self.logprob.append((found.gather(1, tokens) - expected.gather(1, tokens)).abs()[:, 0])
            self.divergence.append((expected.exp() * (expected - found)).sum(-1))
            self.is_same_best.append(expected.argmax(-1) == found.argmax(-1))

    def summary(self) -> dict[str, Any]:
        """Return means and maxima."""
        errors, divergence = torch.cat(self.logprob), torch.cat(self.divergence)
        if not bool(errors.isfinite().all()):
            raise SystemExit("a contender's logits are not finite")
        return {
            "positions": errors.numel(),
            "logprob_error_mean": round(float(errors.mean()), 5),
            "logprob_error_p99": round(float(errors.quantile(0.99)), 4),
            "logprob_error_worst": round(float(errors.max()), 4),
            "kl_mean": float(f"{float(divergence.mean()):.4g}"),
            "kl_standard_error": float(f"{float(divergence.std()) / divergence.numel() ** 0.5:.2g}"),
            "kl_worst": float(f"{float(divergence.max()):.4g}"),
            "same_best_token": round(float(torch.cat(self.is_same_best).double().mean()), 4),
        }


def make_texts(files: ModelFiles, num_sampled: int) -> Texts:
    """Return the golden cases, and continuations that the model samples in its exact arithmetic."""
    cases = json.loads(GOLDEN.read_text())["cases"]
    texts: Texts = [("golden", case["prompt_ids"] + case["token_ids"]) for case in cases.values()]
    if num_sampled:
        teacher = Teacher(files, "float32", num_sampled + 256)
        for seed, name in enumerate(SAMPLED_FROM):
            prompt = cases[name]["prompt_ids"]
            texts.append(("drawn", prompt + teacher.sample(prompt, num_sampled, seed)))
    return texts


def oracle_logits(checkpoint: Path, texts: Texts) -> list[Tensor]:
    """Compute every text with transformers."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for _, ids in texts]


def our_logits(
    files: ModelFiles,
    dtype: str,
    texts: Texts,
    *,
    kv_cache_dtype: str = "auto",
    prompt_precision: str = "int8",
) -> Iterator[Tensor]:
    """Compute every text with this project's kernels, all of it as a prompt."""
    longest = max(len(ids) for _, ids in texts)
    teacher = Teacher(files, dtype, longest, kv_cache_dtype=kv_cache_dtype, prompt_precision=prompt_precision)
    for _, ids in texts:
        yield teacher.logits(ids)


def llama_logits(gguf: Path, options: argparse.Namespace, texts: Texts) -> Iterator[Tensor]:
    """Compute every text with llama.cpp, in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "texts.json"
        tokens.write_text(json.dumps([ids for _, ids in texts]))
        environ = dict(os.environ)
        if options.llama_dir:
            environ["LLAMA_CPP_LIB_PATH"] = str(options.llama_dir.resolve())
        script = str(Path(__file__).with_name("llama_logits.py"))
        threads = str(len(os.sched_getaffinity(0)))
        subprocess.run(
            [str(options.llama_python), script, str(gguf), str(tokens), folder, threads],
            env=environ,
            check=True,
        )
        for index in range(len(texts)):
            yield torch.from_numpy(np.load(Path(folder) / f"{index}.npy"))


def compare(name: str, oracle: list[Tensor], found: Iterable[Tensor], texts: Texts) -> dict[str, Any]:
    """Return a contender's figures over all texts, and by kind of text."""
    by_kind = {kind: Errors() for kind in ("all", *dict.fromkeys(kind for kind, _ in texts))}
    for expected, logits, (kind, ids) in zip(oracle, found, texts, strict=True):
        for group in ("all", kind):
            by_kind[group].add(expected, logits, ids)
    return {"contender": name, **{kind: errors.summary() for kind, errors in by_kind.items()}}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-id", default=DEMO_MODEL, help="a .gguf file or pypi:<package>")
    parser.add_argument("--llama-python", type=Path, help="interpreter that imports llama_cpp and numpy")
    parser.add_argument("--llama-dir", type=Path, help="folder of libllama.so and llama-quantize")
    parser.add_argument("--drawn-tokens", type=int, default=160, help="of each sampled text, or 0")
    parser.add_argument("--work-dir", type=Path, help="keeps the dequantised checkpoint")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    files = resolve(Settings(model_id=options.model_id))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work_dir or Path(scratch)
        checkpoint = folder / "checkpoint"
        if not (checkpoint / "model.safetensors").exists():
            export(files.path, checkpoint)
        texts = make_texts(files, options.drawn_tokens)
        oracle = oracle_logits(checkpoint, texts)
        contenders: dict[str, Callable[[], Iterator[Tensor]]] = {
            "ours, --dtype float32": lambda: our_logits(files, "float32", texts),
            "ours, --dtype auto": lambda: our_logits(files, "auto", texts),
            "ours, --kv-cache-dtype int8": lambda: our_logits(files, "auto", texts, kv_cache_dtype="int8"),
            "ours, --prompt-precision bfloat16": lambda: our_logits(
                files, "auto", texts, prompt_precision="bfloat16"
            ),
        }
        if options.llama_python:
            contenders["llama.cpp, same file"] = lambda: llama_logits(files.path, options, texts)
            if options.llama_dir:
                for kind in ("Q8_0", "Q4_0"):
                    copy = requantised(files.path, options.llama_dir.resolve(), folder, kind)
                    contenders[f"llama.cpp, {kind}"] = partial(llama_logits, copy, options, texts)
        found = [compare(name, oracle, run(), texts) for name, run in contenders.items()]
    emit(
        {"bench": "quality", "command": command_line(), "machine": machine(), "contenders": found},
        options.out,
    )
    keys = ("positions", "logprob_error_mean", "logprob_error_p99", "logprob_error_worst", "kl_mean")
    rows = [
        [row["contender"], kind, *(row[kind][key] for key in keys), row[kind]["same_best_token"]]
        for row in found
        for kind in row
        if kind != "contender"
    ]
    print(table(("contender", "texts", "positions", "error", "p99", "worst", "KL", "same best token"), rows))


if __name__ == "__main__":
    main()
