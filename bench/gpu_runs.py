"""The stages of bench/gpu.py that run whole models: the engine's loop, `transformers`, a server over sockets.

Weights are random: Llama-3-8B's shape in memory, SmolLM2-135M's as a checkpoint for the server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from bench import gpu_model, gpu_stages
from bench.engine import Engine, Sequence
from bench.gpu_stages import Report, time_us
from bench.loads import WORDS, ClosedLoop, Prompts, Target, run
from bench.servers import Server
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading.open import read_config
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import CudaDevice, Device
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.load import LoadedModel

CONTEXT, STEPS = 1024, 64
BATCHES = (16, 64, 1)
STREAMS, REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 64, 192, 100, 64
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


def engine(report: Report) -> None:
    """Drive the runner as the engine does: the time of a step, the GPU's share, the time to launch it."""
    runner = make_runner(gpu_model.SHAPE, CudaDevice(), max_batch=max(BATCHES))
    try:
        asyncio.run(drive(runner, gpu_model.SHAPE.vocab_size, report, _busy_us))
    finally:
        runner.close()


def make_runner(config: ModelConfig, device: Device, max_batch: int) -> CudaRunner:
    """Make a runner of a random model, with room for all its sequences."""
    longest = CONTEXT + 8 * STEPS
    size = KvSize(max_batch * longest // gpu_model.BLOCK, gpu_model.BLOCK, 1, torch.bfloat16)
    model = gpu_model.RandomLlama(config, longest)
    return CudaRunner(
        model, device, lambda free_bytes: size, block_size=gpu_model.BLOCK, max_batch_size=max_batch,
        max_step_tokens=2048 + max_batch, max_context=longest,
    )  # fmt: skip


async def drive(
    runner: CudaRunner, vocab: int, report: Report, busy_us: Callable[[Callable[[], object]], float | None]
) -> None:
    """Time decode steps of each batch size. `busy_us` returns how long the GPU works in a call."""
    launches: list[float] = []
    launch = runner._launch

    def timed(plan: Any) -> Any:
        start = time.perf_counter()
        result = launch(plan)
        launches.append(time.perf_counter() - start)
        return result

    runner._launch = timed  # type: ignore[method-assign]  # what the launcher's thread calls for each step
    engine = Engine(cast(LoadedModel, SimpleNamespace(runner=runner, info=SimpleNamespace(vocab_size=vocab))))
    for batch in BATCHES:
        sequences: list[Sequence] = engine.sequences(batch, CONTEXT, 4 * STEPS)
        await engine.prefill(sequences, 2048)
        await engine.decode(sequences, 8)
        launches.clear()
        step_us = await engine.decode(sequences, STEPS) / STEPS * 1e6
        launch_us = statistics.median(launches) * 1e6
        loop = asyncio.get_running_loop()

        def steps(loop: asyncio.AbstractEventLoop = loop, sequences: list[Sequence] = sequences) -> object:
            return asyncio.run_coroutine_threadsafe(engine.decode(sequences, STEPS), loop).result()

        busy = await loop.run_in_executor(None, busy_us, steps)
        row = {"what": "engine", "batch": batch, "context": CONTEXT, "us": round(step_us, 1)}
        row |= {"tokens_per_s": round(batch / step_us * 1e6), "launch_us": round(launch_us, 1)}
        report("runs", row | ({"gpu_busy": round(busy / STEPS / step_us, 3)} if busy else {}))


def _busy_us(call: Callable[[], object]) -> float | None:
    """Add up the time of all kernels that run during a call; None where they cannot be observed."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(float(event.self_device_time_total) for event in profiler.key_averages()) or None


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
    """Time `transformers` on a random model of this configuration, with the best attention that it has."""
    import transformers

    try:
        import flash_attn  # noqa: F401

        attention = "flash_attention_2"
    except ImportError:
        attention = "sdpa"
    with torch.device(gpu_stages.DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
    with torch.inference_mode():
        for is_compiled, batch in itertools.product((False, True), batches):
            call = _static_step(config, model, batch, is_compiled)
            us = time_us([call])[0]
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
    prompt = torch.randint(config.vocab_size, (batch, CONTEXT), device=gpu_stages.DEVICE)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    forward = torch.compile(model, mode="reduce-overhead") if is_compiled else model
    ids = prompt[:, :1].contiguous()
    return lambda: forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def served(report: Report) -> None:
    """Serve a checkpoint of SmolLM2-135M's shape and let 64 clients stream from it at once."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), SMOLLM2)
        report("runs", serve(Path(folder), STREAMS, REQUESTS))


def serve(directory: Path, streams: int, requests: int) -> dict[str, Any]:
    """Start the server on a checkpoint, run the load, and return its figures."""
    arguments = ["--model-id", str(directory), "--max-batch-size", str(max(streams, 2))]
    with Server.ours(arguments) as server:
        prompts = Prompts(PROMPT_TOKENS)
        load = ClosedLoop(streams, requests)
        asyncio.run(run(ClosedLoop(1, 2), prompts, server.url, max_tokens=4))
        measured = asyncio.run(run(load, prompts, server.url, max_tokens=OUTPUT_TOKENS))
        row = {"what": "served", "start_s": round(server.start_s, 1)} | measured.summary(Target())
    assert not measured.errors, measured.errors[0]
    return row


def write_checkpoint(directory: Path, config: dict[str, Any]) -> None:
    """Write random weights in bfloat16, a tokenizer to which a word is a token, and a chat template."""
    from safetensors.torch import save_file

    from bench.export_checkpoint import weight_names

    _, shape = read_config(config)
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "q_proj": (queries, shape.hidden_size), "k_proj": (keys, shape.hidden_size),
        "v_proj": (keys, shape.hidden_size), "o_proj": (shape.hidden_size, queries),
        "gate_proj": (shape.intermediate_size, shape.hidden_size),
        "up_proj": (shape.intermediate_size, shape.hidden_size),
        "down_proj": (shape.hidden_size, shape.intermediate_size),
        "embed_tokens": (shape.vocab_size, shape.hidden_size),
        "lm_head": (shape.vocab_size, shape.hidden_size),
    }  # fmt: skip
    tensors = {}
    for name in weight_names(shape):
        size = sizes.get(name.split(".")[-2])
        tensors[name] = (
            torch.ones(shape.hidden_size) if size is None else torch.randn(size) * size[1] ** -0.5
        ).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ ' ' + message.content }}{% endfor %}"
    )
    _write_tokenizer(directory / "tokenizer.json", shape.vocab_size)


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """Bytes, each word of `bench.loads` with the space before it, and names for the ids that are left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        spaced = f"\u0120{word}"
        for stop in range(1, len(spaced)):
            merges[spaced[:stop], spaced[stop]] = None
            tokens[spaced[: stop + 1]] = None
    for index in itertools.count():
        if len(tokens) >= vocab_size:
            break
        tokens[f"\u0120n{index}"] = None
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


STAGES = (engine, peers, served)
