"""Models with routed experts, states or latents: decode versus the memory bound, and versus llama.cpp.

    python -m bench.moe --llama-bench path/to/llama-bench [--models olmoe-1b-7b:8,gpt-oss-20b:6] [--rounds 3]

Files of real layers with random weights (`bench.moe_files`) are made once, in --folder. In each round this
project's runner and llama-bench take turns on the same file: one stream generates --tokens, and a prompt is
computed. The bound of a generated token is the bytes of the weights that it needs (only the selected experts,
and no embedding unless it is also the head) over the bandwidth measured just before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
from pathlib import Path
from typing import Any

from bench.bandwidth import read_bandwidth
from bench.engine import Engine
from bench.intervals import advantage, estimate
from bench.moe_files import EXPERTS, MODELS, Model, make
from bench.report import command_line, commit, emit, machine, median, table
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings

CONTEXT = 16  # tokens before the generated ones
FOLDER = Path(__file__).parents[1] / "build" / "moe"


def active_bytes(path: Path, model: Model) -> int:
    """Return the bytes of weights that a generated token needs."""
    file = GgufFile.open(path)
    total = 0
    for name, info in file.tensors.items():
        is_expert = any(part in name for part in EXPERTS)
        is_head = name == "token_embd.weight" and "output.weight" not in file.tensors
        share = model.top_k / model.num_experts if is_expert else is_head or name != "token_embd.weight"
        total += math.ceil(info.nbytes * share)
    file.close()
    return total


async def turn(loaded: LoadedModel, options: argparse.Namespace, num_bytes: int) -> dict[str, float]:
    """Return tokens per second of generating and of a prompt, and the share of the bound."""
    engine = Engine(loaded)
    await engine.prefill(engine.sequences(1, CONTEXT, 0), CONTEXT)  # wakes the threads
    sequences = engine.sequences(1, CONTEXT, options.tokens)
    await engine.prefill(sequences, CONTEXT)
    gb_per_s = read_bandwidth()
    step_s = await engine.decode(sequences, options.tokens) / options.tokens
    prompt_s = await engine.prefill(engine.sequences(1, options.prompt, 0), options.prompt)
    return {
        "read_gb_per_s": gb_per_s,
        "decode": round(1 / step_s, 2),
        "share_of_bound": round(num_bytes / step_s / 1e9 / gb_per_s, 3),
        "prompt": round(options.prompt / prompt_s, 1),
    }


def llama_turn(path: Path, options: argparse.Namespace, threads: int) -> dict[str, float]:
    """Return llama-bench's tokens per second of both.

    Raises:
        SystemExit: if it fails.
    """
    numbers = {"-p": options.prompt, "-n": options.tokens, "-t": threads, "-r": 1}
    arguments = [word for name, number in numbers.items() for word in (name, str(number))]
    command = [str(options.llama_bench), "-m", str(path), *arguments, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama-bench failed:\n{done.stderr[-2000:]}")
    rows = json.loads(done.stdout)
    return {
        name: round(next(row["avg_ts"] for row in rows if row[key]), 2)
        for name, key in (("decode", "n_gen"), ("prompt", "n_prompt"))
    }


def compare(name: str, num_layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in rounds."""
    model, path = MODELS[name], options.folder / f"{name}-{num_layers}.gguf"
    if not path.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        make(path, model, num_layers)
    num_bytes = active_bytes(path, model)
    settings = Settings(model_id=str(path), thread_nice=0, max_batch_total_tokens=4096, max_batch_size=4)
    loaded = load(settings, ModelFiles(name, None, "gguf", path))
    rounds: list[dict[str, Any]] = []
    try:
        for _ in range(options.rounds):
            ours = asyncio.run(turn(loaded, options, num_bytes))
            theirs = None
            if options.llama_bench is not None:
                theirs = llama_turn(path, options, loaded.info.num_threads)
            rounds.append({"ours": ours, "llama.cpp": theirs})
    finally:
        loaded.runner.close()
    record: dict[str, Any] = {
        "model": name, "layers": num_layers, "file_bytes": path.stat().st_size, "active_bytes": num_bytes,
        "threads": loaded.info.num_threads, "rounds": rounds,
        "share_of_bound": estimate([found["ours"]["share_of_bound"] for found in rounds]).rounded(),
    }  # fmt: skip
    for what in ("decode", "prompt") if options.llama_bench is not None else ():
        each = [{at: found[who][what] for at, found in enumerate(rounds)} for who in ("ours", "llama.cpp")]
        ratio = advantage(each[0], each[1], is_lower_better=False)
        record[f"{what}_ratio"] = None if ratio is None else ratio.rounded()
    return record


def _models(text: str) -> list[tuple[str, int]]:
    """Parse names of models with their layers: olmoe-1b-7b:8,gpt-oss-20b:6."""
    found = []
    for word in text.split(","):
        name, _, layers = word.partition(":")
        if name not in MODELS or not layers.isdigit() or not 1 <= int(layers) <= MODELS[name].num_layers:
            raise argparse.ArgumentTypeError(f"{word} is not one of {', '.join(MODELS)} with :layers")
        found.append((name, int(layers)))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    usual = "olmoe-1b-7b:8,qwen3-30b-a3b:8,gpt-oss-20b:6"
    parser.add_argument("--models", type=_models, default=_models(usual), help=f"with their layers: {usual}")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program; without it: ours alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are made and kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="generated in a turn")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    rows = [compare(name, layers, options) for name, layers in options.models]
    record = {"bench": "moe", "command": command_line(), "commit": commit(), "machine": machine()}
    emit({**record, "models": rows}, options.out)
    head = ("model", "tok/s", "of llama.cpp", "share of the bound", "prompt tok/s", "of llama.cpp")
    print(
        table(
            head,
            (
                [
                    f"{row['model']}, {row['layers']} layers",
                    median(found["ours"]["decode"] for found in row["rounds"]),
                    (row.get("decode_ratio") or {}).get("median"),
                    row["share_of_bound"]["median"],
                    median(found["ours"]["prompt"] for found in row["rounds"]),
                    (row.get("prompt_ratio") or {}).get("median"),
                ]
                for row in rows
            ),
        )
    )


if __name__ == "__main__":
    main()
