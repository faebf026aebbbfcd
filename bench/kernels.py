"""Each operator of the recorded step, its time compared with its lower bound by memory or by arithmetic.

    python -m bench.kernels [--model-id model.gguf] [--decode 1,16,64] [--context 100,4000] [--prefill 512]
    python -m bench.kernels --shape 1b-q4_k_m       # random weights

One thread reads a clock after each operator of a step, so a time includes the operator's barrier. The bound
is the longer of two: bytes read (weights once per step, each sequence's KV) over the bandwidth, and
multiply-adds over the peak of their instruction on all threads, both measured just before. The shares of both
are printed as well.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.bandwidth import read_bandwidth
from bench.report import emit, machine, numbers, table
from bench.shapes import SHAPES, load_shape
from tgi_asgi import _C, ops
from tgi_asgi.formats.sources import resolve
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import record
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.settings import DEMO_MODEL, Settings

BLOCK = 16
LAYER = ("norm", "qkv", "attention", "linear_add o", "norm", "gate_up", "linear_add down")
# The same if all products have an order of columns.
ORDERED_LAYER = (
    "norm", "reorder", "qkv", "attention", "reorder", "linear_add o", "norm", "reorder", "gate_up", "reorder",
    "linear_add down",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of step: the number of sequences, tokens of each, and tokens of context including these."""

    sequences: int
    tokens: int
    context: int

    @property
    def name(self) -> str:
        kind = "prefill" if self.tokens > 1 else "decode"
        return f"{kind} {self.sequences} x {self.tokens}, context {self.context}"

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.tokens


class Bench:
    """A model recorded for steps of any of these shapes."""

    def __init__(
        self,
        config: ModelConfig,
        model: Decoder,
        shapes: list[Shape],
        kv_dtype: ops.KvDtype,
        *,
        has_float_prompts: bool,
    ) -> None:
        self.config, self.model, self.kv_dtype = config, model, kv_dtype
        self.has_float_prompts = has_float_prompts
        blocks = max(shape.sequences * -(-shape.context // BLOCK) for shape in shapes)
        pool = ops.KvPool(
            config.caches,
            num_blocks=blocks,
            block_size=BLOCK,
            dtype=kv_dtype,
        )
        pool.native.memory()[:] = 12  # 2.4e-4 as the scale of int8, and close to zero as bfloat16
        limits = ops.StepLimits(
            max_tokens=max(shape.num_tokens for shape in shapes),
            max_sequences=max(shape.sequences for shape in shapes),
            max_rows=max(shape.sequences for shape in shapes),
            max_context=max(shape.context for shape in shapes),
        )
        self._program = ops.CpuProgram(record(model, pool.layers), limits)

    def seconds(self, shape: Shape, repeats: int) -> list[tuple[str, float]]:
        """Return each operator's median seconds per step, summed over layers, in order of first use."""
        batch, rows = _batch(self.config, shape)
        down: ops.LinearWeight = self.model.layers[0].down
        layer = LAYER if down.made.order is None else ORDERED_LAYER
        names = ["embed", *layer * self.config.num_layers, "norm", "logits"]
        if len(names) != self._program.native.num_operators:
            raise SystemExit(
                f"{self.config.architecture} does not have the {len(layer)} calls of Llama's layers"
            )
        runs: list[dict[str, float]] = []
        for _ in range(repeats + 2):
            times = self._program.profile(batch, rows)
            total: dict[str, float] = {}
            for name, seconds in zip(names, times, strict=True):
                total[name] = total.get(name, 0.0) + seconds
            runs.append(total)
        return [(name, statistics.median(run[name] for run in runs[2:])) for name in runs[0]]

    def bytes_read(self, name: str, shape: Shape) -> int:
        """Return what an operator must read from memory in a step."""
        config, layers = self.config, self.model.layers
        if name == "attention":
            per_token = sum(ops.kv_bytes_per_token(cache, self.kv_dtype) for cache in config.caches)
            return shape.sequences * shape.context * per_token
        weights: dict[str, list[Any]] = {
            "qkv": [part for layer in layers for part in layer.qkv.made.parts],
            "linear_add o": [layer.output.made for layer in layers],
            "gate_up": [part for layer in layers for part in layer.up.made.parts],
            "linear_add down": [layer.down.made for layer in layers],
            "logits": [self.model.head.made],
        }
        return sum(part.matrix.nbytes for part in weights.get(name, []))

    def operations(self, name: str, shape: Shape) -> int:
        """Return twice the multiply-adds of an operator in a step."""
        config = self.config
        hidden, queries = config.hidden_size, config.num_heads * config.head_dim
        if name == "attention":
            seen = sum(range(shape.context - shape.tokens + 1, shape.context + 1))
            # In the last layer only the last token attends.
            all_seen = (config.num_layers - 1) * seen + shape.context
            halves = 2 if self.kv_dtype == "int8" else 1  # a high and a low byte of queries and weights
            return 4 * queries * all_seen * shape.sequences * halves
        outputs = {
            "qkv": hidden * (queries + 2 * config.num_kv_heads * config.head_dim),
            "linear_add o": queries * hidden,
            "gate_up": 2 * hidden * config.intermediate_size,
            "linear_add down": config.intermediate_size * hidden,
        }
        if name == "logits":
            return 2 * config.vocab_size * hidden * shape.sequences
        tokens = config.num_layers * shape.num_tokens
        if name != "qkv":  # after the last keys and values, only the last tokens are computed
            tokens -= shape.num_tokens - shape.sequences
        return 2 * outputs.get(name, 0) * tokens


def _batch(config: ModelConfig, shape: Shape) -> tuple[ops.FlatRows, list[int]]:
    width = -(-shape.context // BLOCK)
    blocks = np.arange(shape.sequences * width, dtype=np.int32).reshape(shape.sequences, width)
    span = np.arange(shape.context - shape.tokens, shape.context)
    slots = blocks[:, span // BLOCK].astype(np.int64) * BLOCK + span % BLOCK
    starts = np.arange(shape.sequences + 1) * shape.tokens
    batch = ops.FlatRows(
        ids=np.random.default_rng(0).integers(0, config.vocab_size, shape.num_tokens),
        positions=np.tile(span, shape.sequences),
        slots=slots.reshape(-1),
        query_start=starts,
        context_len=np.full(shape.sequences, shape.context),
        block_table=blocks,
        num_generated=shape.num_tokens if shape.tokens == 1 else 0,
    )
    return batch, (starts[1:] - 1).tolist()


def report(bench: Bench, shape: Shape, repeats: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Measure a shape; return one row per operator."""
    bandwidth = read_bandwidth(repeats=7)
    rows = []
    for name, seconds in bench.seconds(shape, repeats):
        size, work = bench.bytes_read(name, shape), bench.operations(name, shape)
        is_bfloat16 = name == "attention" and bench.kv_dtype == "bfloat16"
        is_bfloat16 |= name != "logits" and shape.tokens > 1 and bench.has_float_prompts
        peak = peaks["bfloat16" if is_bfloat16 else "int8"]
        floor = max(size / bandwidth / 1e9, work / peak / 1e12)
        rows.append(
            {
                "shape": shape.name,
                "operator": name,
                "ms": seconds * 1e3,
                "floor_ms": floor * 1e3,
                "share_of_floor": floor / seconds if floor else None,
                "share_of_peak": work / peak / 1e12 / seconds if work else None,
                "share_of_bandwidth": size / bandwidth / 1e9 / seconds if size else None,
                "gb_per_s": size / seconds / 1e9 if size else None,
                "top_per_s": work / seconds / 1e12 if work else None,
                "bandwidth_gb_per_s": bandwidth,
            }
        )
    return rows


def _load(model_id: str, packing: ops.Packing, positions: int) -> tuple[ModelConfig, Decoder]:
    files = resolve(Settings(model_id=model_id))
    with OpenModel(files) as opened:
        model = opened.load(packing, positions)
        if not isinstance(model, Decoder) or not isinstance(opened.config, ModelConfig):
            raise SystemExit(f"{opened.config.architecture} is not timed by operator")
        return opened.config, model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-id", default=DEMO_MODEL)
    parser.add_argument("--shape", choices=SHAPES, help="use random weights of this shape instead of a model")
    parser.add_argument("--decode", type=numbers(int), default=[1, 16, 64], help="sequences of a decode step")
    parser.add_argument("--context", type=numbers(int), default=[100], help="their tokens of context")
    parser.add_argument("--prefill", type=numbers(int), default=[512], help="tokens of one prompt in a step")
    parser.add_argument("--kv-cache-dtype", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--prompt-precision", choices=("int8", "bfloat16"), default="int8")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--repeats", type=int, default=40, help="repetitions of a decode step; a tenth for prefill"
    )
    parser.add_argument("--out", type=Path, default=None, help="write the JSON object here too")
    arguments = parser.parse_args()
    threads = ops.configure_threads(arguments.threads, nice=0)
    shapes = [Shape(count, 1, context) for context in arguments.context for count in arguments.decode]
    shapes += [Shape(1, tokens, tokens) for tokens in arguments.prefill]
    positions = max(shape.context for shape in shapes)
    has_float_prompts = arguments.prompt_precision == "bfloat16"
    packing = ops.Packing(is_exact=False, has_float_prompts=has_float_prompts)
    if arguments.shape is not None:
        config, model = load_shape(arguments.shape, packing, positions)
    else:
        config, model = _load(arguments.model_id, packing, positions)
    bench = Bench(config, model, shapes, arguments.kv_cache_dtype, has_float_prompts=has_float_prompts)
    peaks = {
        name: max(_C.arithmetic_peak(name) for _ in range(5)) / 1e12
        for name in ("int8", "bfloat16", "float32")
    }
    rows = []
    for shape in shapes:
        repeats = arguments.repeats if shape.tokens == 1 else max(arguments.repeats // 10, 3)
        rows += report(bench, shape, repeats, peaks)
    record = {
        "bench": "kernels",
        "model": arguments.shape or Path(arguments.model_id).name,
        "machine": machine(),
        "isa": _C.kernel_set(),
        "threads": threads,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "prompt_precision": arguments.prompt_precision,
        "peak_top_per_s": peaks,
        "operators": rows,
    }
    emit(record, arguments.out)
    columns = ("operator", "ms", "floor_ms", "share_of_peak", "share_of_bandwidth", "gb_per_s", "top_per_s")
    for shape in shapes:
        mine = [row for row in rows if row["shape"] == shape.name]
        print(f"\n{shape.name} ({mine[0]['bandwidth_gb_per_s']:.0f} GB/s before)")
        print(table(columns, ([row[column] for column in columns] for row in mine)))
        total, floor = (sum(row[name] for row in mine) for name in ("ms", "floor_ms"))
        print(f"step {total:.2f} ms, {shape.num_tokens / total * 1e3:,.0f} tokens/s, floor {floor:.2f} ms")


if __name__ == "__main__":
    main()
