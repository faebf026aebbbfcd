"""`--prompt-attention auto` and `sdpa`: torch over gathered keys and values, and what stays with our kernel.

On a GPU (TGI_TEST_GPU=1) torch's own operators run; elsewhere stand-ins. Launches of our kernels are counted
in the emulation only.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import (
    FP16,
    ON_GPU,
    PROMPT,
    SHAPE,
    assert_matches_reference,
    make_device,
    save_with_tokenizer,
)
from tests.cuda.gpu_device import CountedGpu
from tests.cuda.paged_cache import PagedCase, Shape, assert_attended
from tests.cuda.sdpa_stand_in import SdpaStandIn
from tests.emulation import bindings
from tests.emulation.device import Device
from tests.support.checkpoints import load_model, make_model, save
from tests.support.runner_driver import Job, generate
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.pooling import PoolingFiles
from tgi_asgi.ops import cuda_attention, cuda_sdpa
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_attention import GatheredAttention, Gathering, can_gather
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.ops.cuda_sdpa import Library, Workspace
from tgi_asgi.runner import cuda_load
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

FP8 = torch.float8_e4m3fn
WANTED = SamplingParams(temperature=0.0, logprobs=0)


Gpu = EmulatedDevice | CountedGpu
emulated_only = pytest.mark.skipif(
    ON_GPU, reason="it changes what torch's operators do, or that there are none"
)


@pytest.fixture
def gpu() -> Gpu:
    return make_device()


@pytest.fixture
def torch_s() -> Iterator[SdpaStandIn | None]:
    """Stand in for torch's operators; None: a GPU has them."""
    if ON_GPU:
        yield None
        return
    stand_in = SdpaStandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def calls(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count launches of native kernels by name, and sequences whose attention torch computes as "sdpa"."""
    counts: Counter[str] = Counter()
    attend = GatheredAttention._attend_gathered

    def count(name: str) -> None:
        counts[name] += 1

    def count_attend(self: GatheredAttention, *given: Any) -> None:
        counts["sdpa"] += 1
        attend(self, *given)

    monkeypatch.setattr(GatheredAttention, "_attend_gathered", count_attend)
    with contextlib.nullcontext() if ON_GPU else bindings.observed(count):
        yield counts


def assert_native(calls: Counter[str], name: str, wanted: Callable[[int], bool]) -> None:
    """Check the number of launches of a native kernel, which a GPU does not count."""
    assert ON_GPU or wanted(calls[name]), f"{calls[name]} launches of {name}"


def make_runner(
    reference: transformers.PreTrainedModel, directory: Path, gpu: Gpu, **changes: Any
) -> CudaRunner:
    model = load_model(save(reference, directory, FP16), Repacking(FP16), max_positions=256)
    given: dict[str, Any] = {"prompt_attention": "sdpa", "max_batch_size": 4, "max_batch_prefill_tokens": 60}
    settings = Settings(**given | changes)
    spec = cuda_load.spec_of(settings, FP16, 256)
    runner = cuda_load.make_runner(model, settings, gpu, spec, PoolingFiles())
    return runner


@pytest.mark.parametrize("library", Library)
@pytest.mark.parametrize(
    "shape",
    [
        Shape([1], [1]),
        Shape([17, 3, 64], [17, 3, 64]),
        Shape([300, 40], [300, 40]),  # the second is beside the end of the queries
        Shape([129, 900], [20, 300], dtype=torch.float16, block_size=32),  # after prefixes, one of a tile
        Shape([1800], [1100], num_heads=2, num_kv_heads=1),  # two blocks of queries
        Shape([65, 130], [1, 33], num_heads=3, num_kv_heads=1, head_dim=80),
        Shape([75, 812], [30, 44], kv_dtype=FP8, num_heads=6, head_dim=80),
        Shape([768], [256], kv_dtype=FP8, head_dim=128, dtype=torch.float16),  # no lead
    ],
    ids=str,
)
def test_rows_equal_the_reference(
    device: Device, gpu: Gpu, torch_s: SdpaStandIn | None, shape: Shape, library: Library
) -> None:
    where, head_dim = gpu.device, shape.head_dim
    if ON_GPU:
        given = (shape.num_heads, shape.num_kv_heads, head_dim, shape.dtype, where)
        if why_not := cuda_sdpa._try(library, *given):
            pytest.skip(f"{library} is not for this shape: {why_not}")
    case = PagedCase(device, shape)
    query, table, pool = (each.to(where, copy=True) for each in (case.q, case.block_table, case.kv))
    rows = cuda_sdpa.padded(max(case.counts) * shape.block_size)
    staged = (cuda_sdpa.staging_rows(max(shape.queries)), *query.shape[1:])
    space = Workspace(
        torch.full((2, shape.num_kv_heads, rows, head_dim), torch.nan, dtype=shape.dtype, device=where),
        torch.full(staged, torch.nan, dtype=shape.dtype, device=where),
    )
    lengths = list(zip(shape.queries, shape.contexts, strict=True))
    layer, out = CudaKvLayer(pool, *case.kv_scales), torch.empty_like(query)
    attention = GatheredAttention(Gathering(library, 1, 1), layer, head_dim**-0.5, space, never)
    attention.attend(query, table, table[0], table[0], 0, lengths, out)
    case.out.copy_(out)
    assert_attended(case)


def never(*given: object) -> None:
    raise AssertionError("every prompt is gathered")


@emulated_only
def test_prompts_that_the_library_refuses_later_are_the_native_kernel_s(
    device: Device, gpu: Gpu, torch_s: SdpaStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    """The trial at load has other lengths: the step goes on, and so do later ones."""
    case = PagedCase(device, Shape([70, 90, 40], [70, 90, 40], head_dim=64, num_heads=2, num_kv_heads=1))
    rows = cuda_sdpa.padded(90)
    kv, queries = case.kv.new_zeros(2, 1, rows, 64), case.q.new_zeros(cuda_sdpa.staging_rows(90), 2, 64)
    taken: list[tuple[int, int]] = []  # longest prompt, and number of prompts

    def paged(query: Any, starts: Any, context_len: Any, tables: Any, longest: int, out: Any) -> None:
        taken.append((longest, len(tables)))

    gathering = Gathering(Library.CUDNN, min_tokens=50, min_pairs=1)
    layer = CudaKvLayer(case.kv, *case.kv_scales)
    attention = GatheredAttention(gathering, layer, 0.125, Workspace(kv, queries), paged)
    starts = torch.tensor([0, 70, 160, 200], dtype=torch.int32)
    given = (case.q, case.block_table, starts, case.context_len, 0, [(70, 70), (90, 90), (40, 40)], case.out)
    attention.attend(*given)
    assert taken == [(40, 1)] and len(torch_s.calls) == 2
    taken.clear()
    torch_s.refuses, torch_s.reason = {"cudnn"}, "error: CUDNN_STATUS_ALLOC_FAILED"
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        attention.attend(*given)  # which refuses no shape: the step is tried again with more memory
    assert taken == []
    torch_s.reason = "is not for these\nof course"
    attention.attend(*given)
    assert taken == [(90, 3)], "none is lost, and all are one launch"
    torch_s.refuses = set()
    attention.attend(*given)
    assert taken == [(90, 3)] * 2 and len(torch_s.calls) == 2
    [record] = [record for record in caplog.records if "refused" in record.message]
    assert "cuDNN refused 70 tokens of 70: cudnn is not for these" in record.message


def test_a_split_covers_the_keys_in_pieces_of_few_sizes() -> None:
    for num_tokens in (1, 3, 255, 256, 257, 1000, 2049, 8192):
        for prefix in (0, 1, 255, 256, 300, 7680, 8000, 131072, 100_001):
            found = cuda_sdpa.split(num_tokens, prefix + num_tokens)
            sizes = [size for _, size in found.pieces]
            assert [first for first, _ in found.pieces] == [sum(sizes[:i]) for i in range(len(sizes))]
            assert all(size.bit_count() == 1 and size >= cuda_sdpa.TILE for size in sizes)
            assert found.first == sum(sizes) and found.first + found.lead == prefix
            assert found.lead < max(cuda_sdpa.TILE, num_tokens / 4 + 1) and len(sizes) < 16
            assert found.rows % cuda_sdpa.TILE == 0
            assert 0 <= found.first + found.rows - prefix - num_tokens < cuda_sdpa.TILE


def test_cudnn_makes_few_plans_whatever_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: set[tuple[int, ...]] = set()

    def attend(
        query: torch.Tensor,
        kv: torch.Tensor,
        keys: tuple[int, int],
        scale: float,
        is_causal: bool,
        has_sums: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, count = keys
        assert len(query) % cuda_sdpa.TILE == count % cuda_sdpa.TILE == 0 and first + count <= kv.shape[2]
        plans.add((len(query), count, is_causal, has_sums))
        return query, torch.zeros(1, len(query))

    def merge(parts: list[torch.Tensor], sums: list[torch.Tensor], scale: float, out: torch.Tensor) -> None:
        assert {len(each) for each in parts} == {each.shape[1] for each in sums} == {len(out)}

    monkeypatch.setattr(cuda_sdpa, "_cudnn", attend)
    monkeypatch.setattr(cuda_sdpa, "_kernels", SimpleNamespace(attention_merge=merge))
    most, longest = 4096, 131072
    query, out = torch.zeros(most, 1, 8), torch.zeros(most, 1, 8)
    space = Workspace(torch.zeros(2, 1, longest, 8), torch.zeros(cuda_sdpa.staging_rows(most), 1, 8))
    for _ in range(2000):
        num_tokens = int(torch.randint(1, most + 1, ()))
        context = num_tokens + int(torch.randint(0, longest - num_tokens + 1, ()) * torch.rand(()) ** 3)
        first = int(torch.randint(0, most - num_tokens + 1, ()))
        cuda_sdpa.attend(Library.CUDNN, query, (num_tokens, context), space, 1.0, 1.0, first, out)
    assert 50 < len(plans) <= 72


async def test_prompts_in_chunks_beside_others_follow_the_reference(
    tmp_path: Path, gpu: Gpu, torch_s: SdpaStandIn | None, calls: Counter[str]
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
    assert calls["sdpa"] == 2 * 6
    assert_native(calls, "attention_prefill", lambda count: count == 0)
    assert_native(calls, "attention_decode", lambda count: count > 0)


@pytest.mark.parametrize("kept", ["auto", "fp8_e4m3fn"])
async def test_a_step_of_the_largest_size_is_tried_before_the_cache_is_made(
    tmp_path: Path, gpu: Gpu, torch_s: SdpaStandIn | None, calls: Counter[str], kept: str
) -> None:
    runner = make_runner(make_model(**SHAPE), tmp_path, gpu, kv_cache_dtype=kept)
    try:
        assert calls["sdpa"] == 2
        assert_native(calls, "attention_prefill", lambda count: count == 0)
    finally:
        runner.close()


async def test_layers_with_a_window_keep_our_kernel(
    tmp_path: Path, gpu: Gpu, torch_s: SdpaStandIn | None, calls: Counter[str]
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
    assert calls["sdpa"] == 2, "one layer of two, two chunks"
    assert_native(calls, "attention_prefill", lambda count: count == 2)


def test_what_torch_s_kernels_do_not_have_keeps_ours() -> None:
    heads = np.zeros(2, np.float32)
    others: list[dict[str, Any]] = [
        {"window": 4}, {"chunk": 4}, {"soft_cap": 30.0}, {"sinks": heads}, {"slopes": heads}
    ]  # fmt: skip
    assert can_gather(AttentionSpec(0.125))
    assert not any(can_gather(AttentionSpec(0.125, **other)) for other in others)


async def test_batch_invariance_keeps_our_kernel_and_says_so(
    tmp_path: Path,
    gpu: Gpu,
    torch_s: SdpaStandIn | None,
    calls: Counter[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = make_runner(make_model(**SHAPE), tmp_path, gpu, batch_invariant=True)
    try:
        await generate(runner, [Job(PROMPT, 2, WANTED)])
    finally:
        runner.close()
    assert calls["sdpa"] == 0
    assert_native(calls, "attention_prefill", lambda count: count > 0)
    assert "--prompt-attention sdpa is ignored" in caplog.text


async def test_only_long_prompts_leave_our_kernel_and_the_graphs(
    tmp_path: Path,
    gpu: Gpu,
    torch_s: SdpaStandIn | None,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = make_model(**SHAPE)
    monkeypatch.setattr(cuda_attention, "Gathering", lambda library: Gathering(library, 10, 150))
    runner = make_runner(reference, tmp_path, gpu, prompt_attention="auto")
    try:
        assert runner.prompts_by in list(Library)
        calls.clear()
        short = [Job(PROMPT[:9], 2, WANTED), Job(PROMPT[2:7], 2, WANTED)]
        before = gpu.replayed
        await generate(runner, short)
        assert calls["sdpa"] == 0 and gpu.replayed > before, "a step of short prompts is a graph"
        jobs = [Job((PROMPT * 2)[:n], 2, WANTED) for n in (5, 3, 30, 6, 11)]
        await generate(runner, jobs[:4], chunk=40)
        await generate(runner, [jobs[4]], chunk=40)
    finally:
        runner.close()
    for job in (*short, *jobs):
        assert_matches_reference(job, reference)
    assert calls["sdpa"] == 2, "of 30 tokens, in two layers; 11 have 66 pairs"


def test_a_prompt_is_long_if_it_has_tokens_and_pairs_enough_for_its_calls() -> None:
    default = Gathering(Library.CUDNN)
    assert default.takes(2048, 2048) and default.takes(2048, 8192) and default.takes(4096, 12288)
    assert not default.takes(0, 8192) and not default.takes(1024, 1024) and not default.takes(512, 8192)
    flash = Gathering(Library.FLASH)  # a single call
    assert flash.takes(512, 8192) and not flash.takes(127, 100_000)
    assert Gathering(Library.FLASH, 1, 1).takes(1, 1)


@emulated_only
@pytest.mark.parametrize(
    ("refuses", "is_wrong", "chosen"),
    [
        ((), False, Library.CUDNN),
        (("cudnn",), False, Library.FLASH),
        ((), True, Library.FLASH),
        (("cudnn", "flash"), False, None),
    ],
    ids=str,
)
async def test_the_first_library_that_computes_rightly_is_chosen_at_load(
    tmp_path: Path, gpu: Gpu, torch_s: SdpaStandIn, caplog: pytest.LogCaptureFixture,
    refuses: tuple[str, ...], is_wrong: bool, chosen: Library | None,
) -> None:  # fmt: skip
    torch_s.refuses, torch_s.is_wrong = set(refuses), is_wrong
    caplog.set_level("INFO")
    reference = make_model(**SHAPE)
    runner = make_runner(reference, tmp_path, gpu, prompt_attention="auto")
    try:
        job = Job(PROMPT, 2, WANTED)
        await generate(runner, [job])
        assert runner.prompts_by == chosen
    finally:
        runner.close()
    assert_matches_reference(job, reference)
    for name in refuses:
        assert f"{name} is not for these" in caplog.text and "of course" not in caplog.text
    assert ("its results are wrong by" in caplog.text) is is_wrong
    if chosen is None:
        with pytest.raises(ModelLoadError, match="--prompt-attention sdpa: no attention of this torch"):
            make_runner(reference, tmp_path, gpu)


def test_the_fingerprint_names_what_computes_which_prompts(
    tmp_path: Path, gpu: Gpu, torch_s: SdpaStandIn | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: gpu)
    files, found = save_with_tokenizer(make_model(**SHAPE), tmp_path), []
    for way in ("auto", "paged", "sdpa", "invariant"):
        settings = Settings(
            thread_nice=0, num_threads=1, max_batch_size=2, max_batch_prefill_tokens=64, max_total_tokens=128,
            prompt_attention="auto" if way == "invariant" else way, batch_invariant=way == "invariant",
        )  # fmt: skip
        loaded = load(settings, files, lambda *done: None)
        loaded.runner.close()
        found.append(loaded.info.fingerprint)
    assert len(set(found)) == 4, "also without cuBLAS, whose sums depend on the number of tokens"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible, and computes")
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
def test_dependent_launches_are_switched_on_by_the_setting_for_small_steps(
    tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    switched: list[bool] = []
    monkeypatch.setattr(torch.ops.tgi_cuda, "set_dependent_launches", switched.append)
    changes = {"prompt_attention": "paged", "dependent_launches": is_on}
    make_runner(make_model(**SHAPE), tmp_path, gpu, **changes).close()
    assert switched[0] is False
    assert switched[1:2] == ([False] if is_on else []), "the largest step is profiled first"
    assert (True in switched) is is_on
