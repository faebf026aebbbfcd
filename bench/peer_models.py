"""The model files that contenders run: copies of the default model and of one of 1 B weights."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import billion, export_checkpoint, export_w8a8, family_shapes
from bench.contenders import Contender, LlamaCpp, Ours, Vllm
from bench.peer_loads import Plan
from bench.servers import ROOT
from tgi_asgi.formats.sources import resolve
from tgi_asgi.settings import Settings


@dataclass(frozen=True, slots=True)
class Match:
    """Contenders that are compared with each other, and the loads that all of them get."""

    model: str
    plan: Plan
    contenders: Sequence[Contender]


def default_match(options: argparse.Namespace, arguments: Sequence[str], folder: Path) -> Match:
    """Return the match of the model that the command line names.

    llama.cpp's Q8_0 and Q4_0 copies are requantised from the file: the first is as exact as the file, the
    second far from it (bench.quality). vLLM's copies are the exact dequantised weights, computed in bfloat16,
    and those rounded to int8.
    """
    gguf = resolve(Settings(model_id=options.model_id)).path
    plan = Plan(options.prompts, options.clients, options.prompt_tokens, options.max_tokens)
    found: list[Contender] = [Ours("ours", gguf, options.threads, arguments)]
    if options.llama_dir:
        programs = options.llama_dir.resolve()
        copies = [requantised(gguf, programs, folder, kind) for kind in ("Q8_0", "Q4_0")]
        for name, path in zip(("same file", "Q8_0", "Q4_0"), (gguf, *copies), strict=True):
            found.append(LlamaCpp(f"llama.cpp {name}", path, programs, options.threads))
    if options.vllm_python:
        checkpoint = made(folder / "checkpoint", lambda path: export_checkpoint.export(gguf, path))
        found += _vllm(checkpoint, folder, options, plan)
    return Match(gguf.stem, plan, found)


def billion_match(options: argparse.Namespace, arguments: Sequence[str], folder: Path) -> Match:
    """Return the match of the model of a billion weights, with shorter loads: it is eight times as large."""
    programs, threads = options.llama_dir.resolve(), options.threads
    plan = Plan((512,), (1, 16), options.prompt_tokens, 24)
    checkpoint = made(folder / "checkpoint", billion.make)
    whole = _converted(checkpoint, folder, options)
    quantised = {kind: requantised(whole, programs, folder, kind) for kind in ("Q4_K_M", "Q8_0")}
    found: list[Contender] = []
    for kind, path in quantised.items():
        found.append(Ours(f"ours {kind}", path, threads, arguments))
        found.append(LlamaCpp(f"llama.cpp {kind}", path, programs, threads))
    found.append(Ours("ours bf16", checkpoint, threads, arguments))
    if options.vllm_python:
        found += _vllm(checkpoint, folder, options, plan)
    return Match("1 B", plan, found)


def family_match(name: str, options: argparse.Namespace, arguments: Sequence[str], folder: Path) -> Match:
    """Return the match of another family's model, with one Q4_K_M file."""
    programs, threads = options.llama_dir.resolve(), options.threads
    checkpoint = made(folder / "checkpoint", lambda path: family_shapes.make(path, name))
    file = requantised(_converted(checkpoint, folder, options), programs, folder, "Q4_K_M")
    contenders = (
        Ours("ours Q4_K_M", file, threads, arguments),
        LlamaCpp("llama.cpp Q4_K_M", file, programs, threads),
    )
    return Match(name, Plan((512,), (1,), options.prompt_tokens, options.max_tokens), contenders)


def _converted(checkpoint: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Return a checkpoint converted by llama.cpp's converter."""
    converter = [str(options.convert_python), str(options.llama_source / "convert_hf_to_gguf.py")]
    to_file = [*converter, str(checkpoint), "--outtype", "bf16", "--outfile"]
    return made(folder / "BF16.gguf", lambda path: run([*to_file, str(path)]))


def _vllm(checkpoint: Path, folder: Path, options: argparse.Namespace, plan: Plan) -> list[Contender]:
    small = made(folder / "w8a8", lambda path: export_w8a8.export(checkpoint, path))
    return [
        Vllm(
            name,
            path,
            options.vllm_python.absolute(),
            options.vllm_libraries,
            options.threads,
            plan.max_clients,
        )
        for name, path in (("vLLM bf16", checkpoint), ("vLLM W8A8", small))
    ]


def requantised(gguf: Path, programs: Path, folder: Path, kind: str) -> Path:
    """Return a copy of a file in another type, made by llama-quantize unless it exists."""

    def make(path: Path) -> None:
        run([str(programs / "llama-quantize"), "--allow-requantize", str(gguf), str(path), kind, "2"])

    return made(folder / f"{gguf.stem}.{kind}.gguf", make)


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """Return a file or folder; it is made under another name, so that a partial one is never used."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"partial-{path.name}")
        make(partial)
        partial.rename(path)
    return path


def run(command: Sequence[str]) -> None:
    """Run a program.

    Raises:
        SystemExit: if it fails; the message contains the end of its log.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed:\n{done.stderr[-2000:]}")
