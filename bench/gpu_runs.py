"""The stages of bench/gpu.py that run whole models: a step, the engine's loop, `transformers`, a profile.

Weights are random, in Llama-3-8B's shape.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch

from bench import gpu_apart, gpu_model, gpu_prepared, gpu_timing
from bench.engine import Engine, Sequence
from bench.gpu_kernels import Report, measure_ceilings
from bench.gpu_model import GREEDY, TOP_P, StepKind
from bench.gpu_timing import time_calls
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.ops.cuda_kv import CudaKvFormat
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.ops.step_limits import StepLimits
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import CudaDevice, Device
from tgi_asgi.runner.cuda_steps import CudaStepSpec
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.load import LoadedModel
from tgi_asgi.runner.plan import SlotStart, StepRow
from tgi_asgi.types import SamplingParams

KINDS = (  # in order of importance
    StepKind(1, 1024), StepKind(64, 1024), StepKind(64, 1024, prompt=512),
    StepKind(64, 1024, sampling="top-p"), StepKind(256, 1024), StepKind(16, 8192),
    StepKind(64, 1024, kv="fp8"), StepKind(1, 1024, "int4"), StepKind(16, 1024, "int4"),
    StepKind(16, 1024, "q8_0"), StepKind(64, 1024, sampling="greedy"),
    StepKind(16, 1024), StepKind(16, 8192, kv="fp8"), StepKind(16, 1024, "fp8"), StepKind(1, 8192),
    StepKind(1, 1024, prompt=2048), StepKind(1, 1024, "fp8", prompt=2048),
    StepKind(1, 1024, "w8a8", prompt=2048), StepKind(64, 1024, "w8a8"),
)  # fmt: skip
DEPENDENT = KINDS[:2]  # also with kernels that begin while the previous one still runs
CONTEXT, STEPS = 1024, 64
BATCHES = (16, 64, 1)
PROMPTS = (128, 1024, 4096)  # tokens: the time to the first token of a single prompt
CHUNK = 512  # prompt tokens in a step with sequences that decode
ENGINES = (  # weights, cache, sampling
    ("bf16", "bf16", GREEDY), ("bf16", "bf16", TOP_P), ("bf16", "fp8", GREEDY), ("int4", "bf16", GREEDY),
    ("q8_0", "fp8", TOP_P),
)  # fmt: skip
_KIND_S = 30  # a kind of step that hangs leaves time for the others
PROFILED = (StepKind(1, 1024), StepKind(64, 1024, sampling="top-p"), StepKind(16, 1024, "int4"))


def step(report: Report) -> None:
    """Time steps of the model, as a graph and launch by launch; report failing ones and continue."""
    limits, failed = gpu_apart.apart(measure_ceilings, _KIND_S), 0
    for kind in KINDS:
        try:
            gpu_apart.apart(functools.partial(time_step, kind, limits, report), _KIND_S)
        except Exception as error:
            failed += 1
            report("step", _of(kind) | {"why": str(error)[:300]})
        gpu_timing.free_memory()
    assert not failed, f"{failed} could not be measured"


def time_step(
    kind: StepKind, limits: dict[str, float], report: Report, config: ModelConfig = gpu_model.SHAPE
) -> None:
    """Time one kind of step: the graph first, then without it, then with dependent launches.

    Dependent launches must produce the same bits. cuBLAS may use other kernels in a graph, so each variant is
    compared only with its own kind.
    """
    made = gpu_model.make_step(kind, config)
    floor = max(made.num_bytes / limits["read"], made.num_flops / limits["bf16"]) * 1e6
    results: dict[bool, torch.Tensor] = {}
    for is_dependent in (False, True) if kind in DEPENDENT else (False,):
        torch.ops.tgi_cuda.set_dependent_launches(is_dependent)
        try:
            out = made.call()
            gpu_timing.synchronize()
            for is_graph, run in ((True, gpu_timing.capture(made.call)), (False, made.call)):
                timing = time_calls([run], may_capture=False)
                first = results.setdefault(is_graph, out.clone())
                row = {"graph": is_graph, "dependent": is_dependent, "floor_us": round(floor, 1)}
                row |= {"of_floor": round(floor / timing.us, 3), "calls": made.num_calls}
                row |= {"same_bits": bool(torch.equal(first, out))} if is_dependent else {}
                report("step", _of(kind) | timing.row() | row)
        finally:
            torch.ops.tgi_cuda.set_dependent_launches(False)


def _of(kind: StepKind) -> dict[str, Any]:
    named = {"batch": kind.batch, "context": kind.context, "weights": kind.weights, "kv": kind.kv}
    return named | {"prompt": kind.prompt, "draw": kind.sampling}


def engine(report: Report) -> None:
    """Drive runners as the engine does: steps, time to the first token, prompts alongside decodes.

    One that fails is reported, and the others are driven.
    """
    failed = 0
    for weights, kv, sampling in ENGINES:
        name = {"weights": weights, "kv": kv, "draw": "greedy" if sampling is GREEDY else "top-p"}

        def named(key: str, row: dict[str, Any], name: dict[str, Any] = name) -> None:
            report(key, {"what": row["what"]} | name | row)

        try:
            _drive_one(weights, kv, sampling, named)
        except Exception as error:
            failed += 1
            named("runs", {"what": "engine", "why": str(error)[:300]})
        gpu_timing.free_memory()
    assert not failed, f"{failed} could not be driven"


def _drive_one(weights: str, kv: str, sampling: SamplingParams, report: Report) -> None:
    runner = make_runner(gpu_model.SHAPE, CudaDevice(), max(BATCHES), weights, kv)
    try:
        asyncio.run(drive(runner, gpu_model.SHAPE.vocab_size, report, _busy_us, sampling))
    finally:
        runner.close()


def make_runner(
    config: ModelConfig, device: Device, max_batch: int, weights: str = "bf16", kv: str = "bf16"
) -> CudaRunner:
    """Make a runner of a random model, with enough cache for all its sequences."""
    longest = max(CONTEXT + 8 * STEPS, max(PROMPTS) + gpu_model.BLOCK)
    tokens = (max_batch + 1) * (CONTEXT + 8 * STEPS) + longest
    needs = BlockNeeds((None,), gpu_model.BLOCK, max(PROMPTS) + max_batch)
    size = KvSize(-(-tokens // gpu_model.BLOCK), needs, 1, "bfloat16")
    model = gpu_model.RandomLlama(config, longest, weights)
    limits = StepLimits(
        max_tokens=max(PROMPTS) + max_batch, max_sequences=max_batch, max_rows=max_batch, max_context=longest
    )
    stored = CudaKvFormat(gpu_model.BLOCK, gpu_model.KV_TYPES[kv])
    return CudaRunner(model, device, lambda free_bytes: size, CudaStepSpec(limits, CudaModes(), stored))


async def drive(
    runner: CudaRunner,
    vocab: int,
    report: Report,
    busy_us: Callable[[Callable[[], object]], float | None],
    sampling: SamplingParams = GREEDY,
) -> None:
    """Time prompts alone, decode steps of each batch size, and steps with both.

    `push_us` is the host's time for a step on the event loop, `launch_us` that on the launcher's thread.
    `busy_us` returns how long the GPU works in a call.
    """
    launches: list[float] = []
    runner._launch = gpu_prepared.timed(launches, runner._launch)  # type: ignore[method-assign]
    pushes: list[float] = []
    submits: list[float] = []
    gpu_prepared.watch(runner, pushes, submits)
    loaded = cast(LoadedModel, SimpleNamespace(runner=runner, info=SimpleNamespace(vocab_size=vocab)))
    engine = Engine(loaded, sampling=sampling)
    for tokens in PROMPTS:
        times = [await engine.prefill(engine.sequences(1, tokens, 1), tokens) for _ in range(4)]
        first_us = statistics.median(times[1:]) * 1e6
        row = {"what": "ttft", "prompt": tokens, "us": round(first_us, 1)}
        report("runs", row | {"tokens_per_s": round(tokens / first_us * 1e6)})
    for batch in BATCHES:
        sequences: list[Sequence] = engine.sequences(batch, CONTEXT, 4 * STEPS)
        await engine.prefill(sequences, 2048)
        await engine.decode(sequences, 8)
        pushes.clear()
        submits.clear()
        step_us = await engine.decode(sequences, STEPS) / STEPS * 1e6
        push_us, launch_us = (round(statistics.median(times) * 1e6, 1) for times in (pushes, submits))
        loop = asyncio.get_running_loop()

        def steps(loop: asyncio.AbstractEventLoop = loop, sequences: list[Sequence] = sequences) -> object:
            return asyncio.run_coroutine_threadsafe(engine.decode(sequences, STEPS), loop).result()

        busy = await loop.run_in_executor(None, busy_us, steps)
        row = {"what": "decode", "batch": batch, "context": CONTEXT, "us": round(step_us, 1)}
        row |= {"tokens_per_s": round(batch / step_us * 1e6), "push_us": push_us, "launch_us": launch_us}
        report("runs", row | ({"gpu_busy": round(busy / STEPS / step_us, 3)} if busy else {}))
    launches.clear()
    submits.clear()
    row = await mixed(engine, max(BATCHES) - 1)
    report("runs", row | {"launch_us": round(statistics.median([*launches, *submits]) * 1e6, 1)})


async def mixed(engine: Engine, batch: int) -> dict[str, Any]:
    """Time steps in which sequences decode while a prompt is prefilled chunk by chunk, one step in flight."""
    *sequences, newcomer = engine.sequences(batch + 1, CONTEXT, 4 * STEPS)
    await engine.prefill(sequences, 2048)
    await engine.decode(sequences, 4)
    chunk, times = min(CHUNK, CONTEXT), []
    for _ in range(4):
        starts = [SlotStart(newcomer.slot, engine.sampling, 0, newcomer.prompt)]
        for first in range(0, CONTEXT - chunk + 1, chunk):
            ids = newcomer.prompt[first : first + chunk]
            samples = first + chunk == CONTEXT
            row = StepRow(newcomer.slot, ids, first, newcomer.tables, samples=samples)
            start_s = time.perf_counter()
            await engine.submit([*engine.decode_rows(sequences), row], starts)
            times.append(time.perf_counter() - start_s)
            starts = []
    us = round(statistics.median(times) * 1e6, 1)
    return {"what": "mixed", "batch": batch, "context": CONTEXT, "prompt": chunk, "us": us}


def _busy_us(call: Callable[[], object]) -> float | None:
    """Return the total time of all kernels that run during a call; None if they cannot be observed."""
    return sum(us for _, _, us in _kernels_of(call)) or None


def _kernels_of(call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Return name, number and microseconds of each kernel that runs during a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        gpu_timing.synchronize()
    found = profiler.key_averages()
    return [(event.key, int(event.count), float(event.self_device_time_total)) for event in found]


def profiler(report: Report) -> None:
    """Report the kernels in which steps spend their time: the fifteen that take most."""
    for kind in PROFILED:
        made = gpu_model.make_step(kind)
        made.call()
        kernels = sorted(_kernels_of(made.call), key=lambda kernel: -kernel[2])
        for name, count, us in kernels[:15]:
            report("profile", _of(kind) | {"kernel": name[:120], "count": count, "us": round(us, 1)})
        del made
        gpu_timing.free_memory()


def peers(report: Report) -> None:
    """Time a decode step of `transformers` with a static cache: as it is, then compiled."""
    try:
        import transformers
    except ImportError:
        report("runs", {"what": "transformers", "why": "not installed"})
        return
    shape = gpu_model.SHAPE
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=shape.context_length,
    )  # fmt: skip
    time_transformers(config, report, (64, 1))


def time_transformers(config: Any, report: Report, batches: tuple[int, ...]) -> None:
    """Time `transformers` on a random model of this configuration, with the best available attention."""
    import transformers

    try:
        import flash_attn  # noqa: F401

        attention = "flash_attention_2"
    except ImportError:
        attention = "sdpa"
    with torch.device(gpu_timing.DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
    with torch.inference_mode():
        for is_compiled, batch in itertools.product((False, True), batches):
            call = _static_step(config, model, batch, is_compiled)
            us = time_calls([call], may_capture=False).us
            report(
                "runs",
                {
                    "what": "transformers", "attention": attention, "compiled": is_compiled, "batch": batch,
                    "context": CONTEXT, "us": round(us, 1), "tokens_per_s": round(batch / us * 1e6),
                },
            )  # fmt: skip


def _static_step(config: Any, model: Any, batch: int, is_compiled: bool) -> Callable[[], object]:
    """Fill a static cache with a prompt and return a call that decodes one token of each sequence."""
    import transformers

    cache = transformers.StaticCache(config=config, max_cache_len=CONTEXT + 64)
    is_renamed = "cache" in inspect.signature(model.forward).parameters  # since transformers 5.24
    kept = {"cache" if is_renamed else "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    prompt = torch.randint(config.vocab_size, (batch, CONTEXT), device=gpu_timing.DEVICE)
    model(input_ids=prompt, **kept)
    forward = torch.compile(model, mode="reduce-overhead") if is_compiled else model
    ids = prompt[:, :1].contiguous()
    return lambda: forward(input_ids=ids, **kept)


STAGES = (step, engine, peers, profiler)
