"""`--prompt-attention sdpa`: torch over gathered keys and values, and which layers keep the native kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import (
    FP16,
    PROMPT,
    SHAPE,
    assert_matches_reference,
    make_device,
    save_with_tokenizer,
)
from tests.cuda.paged_cache import PagedCase, Shape, assert_attended
from tests.emulation import bindings
from tests.emulation.device import Device
from tests.support.checkpoints import load_model, make_model, save
from tests.support.runner_driver import Job, generate
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_attention import GatheredAttention, can_gather
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner import cuda_load
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

FP8 = torch.float8_e4m3fn
WANTED = SamplingParams(temperature=0.0, logprobs=0)


@pytest.fixture
def calls(gpu: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count launches of native kernels by name, and sequences whose attention torch computes as "sdpa"."""
    counts: Counter[str] = Counter()
    attend = GatheredAttention.attend

    def count(name: str) -> None:
        counts[name] += 1

    def count_attend(self: GatheredAttention, q: Any, table: Any, first: int, lengths: Any, out: Any) -> None:
        counts["sdpa"] += len(lengths)
        attend(self, q, table, first, lengths, out)

    monkeypatch.setattr(GatheredAttention, "attend", count_attend)
    with bindings.observed(count):
        yield counts


@pytest.fixture
def gpu() -> EmulatedDevice:
    return make_device()


def make_runner(
    reference: transformers.PreTrainedModel, directory: Path, gpu: EmulatedDevice, **changes: Any
) -> CudaRunner:
    model = load_model(save(reference, directory, FP16), Repacking(FP16), max_positions=256)
    given: dict[str, Any] = {"prompt_attention": "sdpa", "max_batch_size": 4, "max_batch_prefill_tokens": 60}
    settings = Settings(**given | changes)
    runner, _ = cuda_load.make_runner(model, settings, gpu, FP16, 256)
    return runner


@pytest.mark.parametrize(
    "shape",
    [
        Shape([1], [1]),
        Shape([17, 3, 64], [17, 3, 64]),
        Shape([129, 40], [20, 40], dtype=torch.float16, block_size=32),  # after a prefix, and whole
        Shape([65, 130], [1, 33], num_heads=3, num_kv_heads=1, head_dim=80),
        Shape([75, 16], [30, 16], kv_dtype=FP8, num_heads=6, head_dim=80),
        Shape([40], [13], kv_dtype=FP8, head_dim=128, dtype=torch.float16),
    ],
    ids=str,
)
def test_rows_equal_the_reference(device: Device, shape: Shape) -> None:
    case = PagedCase(device, shape)
    size = max(case.counts) * case.kv[0].numel()
    gathered = torch.zeros(size, dtype=case.kv.dtype)
    converted = gathered if case.kv.dtype is shape.dtype else torch.zeros(size, dtype=shape.dtype)
    layer = CudaKvLayer(case.kv, *case.kv_scales)
    lengths = list(zip(shape.queries, shape.contexts, strict=True))
    attention = GatheredAttention(layer, shape.head_dim**-0.5, gathered, converted)
    attention.attend(case.q, case.block_table, 0, lengths, case.out)
    assert_attended(case)


async def test_prompts_in_chunks_beside_others_follow_the_reference(
    tmp_path: Path, gpu: EmulatedDevice, calls: Counter[str]
) -> None:
    reference = make_model(**SHAPE)
    runner = make_runner(reference, tmp_path, gpu)
    try:
        calls.clear()
        jobs = [Job((PROMPT * 3)[:n], m, WANTED) for n, m in ((49, 6), (1, 9), (17, 3))]
        await generate(runner, jobs, chunk=20)
    finally:
        runner.close()
    for job in jobs:
        assert_matches_reference(job, reference)
    # Two layers; 20, 20, 9 + 1 + 10 and 7 prompt tokens, with decodes alongside at the end.
    assert (calls["sdpa"], calls["attention_prefill"]) == (2 * 6, 0)
    assert calls["attention_decode"] > 0


@pytest.mark.parametrize("kept", ["auto", "fp8_e4m3fn"])
async def test_a_step_of_the_largest_size_is_tried_before_the_cache_is_made(
    tmp_path: Path, gpu: EmulatedDevice, calls: Counter[str], kept: str
) -> None:
    runner = make_runner(make_model(**SHAPE), tmp_path, gpu, kv_cache_dtype=kept)
    try:
        assert (calls["sdpa"], calls["attention_prefill"]) == (2, 0)
    finally:
        runner.close()


async def test_layers_with_a_window_keep_our_kernel(
    tmp_path: Path, gpu: EmulatedDevice, calls: Counter[str]
) -> None:
    reference = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=160, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, sliding_window=8,
            max_position_embeddings=256, attn_logit_softcapping=None, eos_token_id=1, pad_token_id=0,
            bos_token_id=2,
        )
    ).eval()  # fmt: skip
    runner = make_runner(reference, tmp_path, gpu)
    try:
        calls.clear()
        job = Job(PROMPT, 3, WANTED)
        await generate(runner, [job], chunk=10)
    finally:
        runner.close()
    assert_matches_reference(job, reference)
    assert (calls["sdpa"], calls["attention_prefill"]) == (2, 2), "a layer of either kind, two chunks"


def test_what_torch_s_kernels_do_not_have_keeps_ours() -> None:
    heads = np.zeros(2, np.float32)
    others: list[dict[str, Any]] = [
        {"window": 4}, {"chunk": 4}, {"soft_cap": 30.0}, {"sinks": heads}, {"slopes": heads}
    ]  # fmt: skip
    assert can_gather(AttentionSpec(0.125))
    assert not any(can_gather(AttentionSpec(0.125, **other)) for other in others)


async def test_batch_invariance_keeps_our_kernel_and_says_so(
    tmp_path: Path, gpu: EmulatedDevice, calls: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    runner = make_runner(make_model(**SHAPE), tmp_path, gpu, batch_invariant=True)
    try:
        await generate(runner, [Job(PROMPT, 2, WANTED)])
    finally:
        runner.close()
    assert calls["sdpa"] == 0 and calls["attention_prefill"] > 0
    assert "--prompt-attention sdpa is ignored" in caplog.text


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (Settings(prompt_attention="sdpa"), "--prompt-attention sdpa"),
        (Settings(dependent_launches=True), "--dependent-launches"),
    ],
    ids=["sdpa", "dependent launches"],
)
def test_what_is_for_gpus_is_refused_on_a_cpu(tmp_path: Path, settings: Settings, flag: str) -> None:
    files = save_with_tokenizer(make_model(), tmp_path)
    with pytest.raises(ModelLoadError, match=f"{flag} is for GPUs"):
        load(settings, files, lambda *done: None)


@pytest.mark.parametrize("is_on", [False, True])
def test_dependent_launches_are_switched_by_the_setting(
    tmp_path: Path, gpu: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    switched: list[bool] = []
    monkeypatch.setattr(torch.ops.tgi_cuda, "set_dependent_launches", switched.append)
    make_runner(make_model(**SHAPE), tmp_path, gpu, dependent_launches=is_on).close()
    assert switched == [is_on]
