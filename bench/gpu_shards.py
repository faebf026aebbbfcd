"""Whether two GPUs compute a small model as one does: the first check of NCCL's collectives.

Part of the stage `checks` of bench/gpu.py, if there are two GPUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner.cuda_device import Device
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

TOLERANCE = 0.05  # of a log-probability, in bfloat16
_SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 4, "vocab_size": 4096,
}  # fmt: skip
_WORDS = 151  # of the vocabulary, that occur in the prompt
_LONGEST = 256
_SETTINGS: dict[str, Any] = {"max_batch_size": 8, "max_batch_prefill_tokens": 128}


def check(device_class: type[Device], report: Callable[[str, Any], None], **shape: int) -> bool:
    """Score a prompt and decode on one device and, if available, on two; return whether the results agree."""
    skipped: dict[str, Any] = {"what": "two shards", "needed": False}
    if device_class.count() < 2:
        report("skipped", skipped | {"why": f"GPUs that can be seen: {device_class.count()}"})
        return True
    row: dict[str, Any] = {"op": "two shards", "dtype": "bfloat16", "cases": 0, "ok": False, "why": None}
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), {**_SHAPE, **shape})
            one, two = (_logprobs(device_class(0), Path(folder), count) for count in (1, 2))
    except ModuleNotFoundError as error:
        report("skipped", skipped | {"why": f"{error.name} is not installed, which reading a model takes"})
        return True
    except Exception as error:
        report("checks", row | {"worst_rel": None, "tol": TOLERANCE, "why": str(error)[:300]})
        return False
    distance = float((one - two).abs().max())
    row |= {"cases": len(one), "worst_rel": round(distance, 5), "tol": TOLERANCE, "ok": distance < TOLERANCE}
    report("checks", row)
    return bool(row["ok"])


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """Write a checkpoint of a random Llama in bfloat16, without a tokenizer."""
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(shape["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        sizes |= {f"model.layers.{layer}.{name}": size for name, size in parts.items()}
    torch.manual_seed(0)
    header: dict[str, Any] = {}
    data = bytearray()
    for name, size in sizes.items():
        values = torch.randn(size) * size[-1] ** -0.5 if len(size) == 2 else torch.ones(size)
        held = values.bfloat16().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(held)]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": list(size), "data_offsets": offsets}
        data += held
    packed = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(packed)) + packed + data)
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": _LONGEST, **shape}
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "rope_theta": 1e4}))


def _logprobs(device: Device, folder: Path, count: int) -> torch.Tensor:
    """Return the log-probabilities of a prompt's tokens, in three chunks, and of the first two samples."""
    from tests.support.runner_driver import Job, generate

    with _runner(device, folder, count) as runner:
        prompt = [(37 * at) % _WORDS for at in range(90)]
        greedy = SamplingParams(temperature=0.0, logprobs=0)
        job = Job(prompt, 2, greedy, wants_prompt_logprobs=0)
        asyncio.run(generate(runner, [job, Job(prompt[:7], 12)], chunk=40))
    scored = [logprob for logprob, _ in job.prompt_logprobs[1:]]
    return torch.tensor([*scored, *(sampled.logprob for sampled in job.sampled)])


@contextlib.contextmanager
def _runner(device: Device, folder: Path, count: int) -> Iterator[Any]:
    from tgi_asgi.formats.sources import ModelFiles
    from tgi_asgi.models.loading.open import OpenModel
    from tgi_asgi.models.pooling import PoolingFiles
    from tgi_asgi.runner import cuda_load

    settings = Settings(num_shard=count, **_SETTINGS)
    files = ModelFiles("random", None, "directory", folder)
    dtype, shards = torch.bfloat16, None
    spec = cuda_load.spec_of(settings, dtype, _LONGEST)
    with contextlib.ExitStack() as failing, OpenModel(files) as opened:
        if count > 1:
            cuts = opened.cuts(count)
            shards = cuda_load.make_shards(files, settings, cuts, device, spec)
            failing.callback(shards.abandon)
            opened.use_cut(cuts[0])
        model: Any = opened.load(Repacking(dtype, device.device), _LONGEST)
        if shards is not None:
            shards.others.wait_ready()
        runner = cuda_load.make_runner(model, settings, device, spec, PoolingFiles(), shards=shards)
        failing.pop_all()
    try:
        yield runner
    finally:
        runner.close()
