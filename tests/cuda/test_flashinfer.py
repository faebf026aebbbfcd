"""`--prompt-attention flashinfer`: what is planned and run, and which layers keep the native kernel.

The package needs a GPU; elsewhere a stand-in with its signatures attends in float64.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.cuda import flashinfer_stand_in
from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import FP16, PROMPT, SHAPE, assert_matches_reference, make_device
from tests.cuda.flashinfer_stand_in import BatchPrefillWithPagedKVCacheWrapper as StandIn
from tests.cuda.gpu_device import GpuDevice
from tests.cuda.paged_cache import PagedCase, Shape, assert_attended
from tests.emulation.device import Device
from tests.support.checkpoints import load_model, make_model, save
from tests.support.runner_driver import Job, generate
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.pooling import PoolingFiles
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_flashinfer import FlashInfer, PlannedAttention, can_plan
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner import cuda_load
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_load import find_device
from tgi_asgi.runner.plan import MAX_IN_FLIGHT
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

FP8 = torch.float8_e4m3fn
WANTED = SamplingParams(temperature=0.0, logprobs=0)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = flashinfer_stand_in.make_module()
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module


@pytest.fixture
def gpu() -> EmulatedDevice:
    return make_device()


def make_runner(
    reference: transformers.PreTrainedModel, directory: Path, gpu: EmulatedDevice, **changes: Any
) -> CudaRunner:
    model = load_model(save(reference, directory, FP16), Repacking(FP16), max_positions=256)
    given: dict[str, Any] = {
        "prompt_attention": "flashinfer", "max_batch_size": 4, "max_batch_prefill_tokens": 60
    }  # fmt: skip
    settings = Settings(**given | changes)
    spec = cuda_load.spec_of(settings, FP16, 256)
    runner = cuda_load.make_runner(model, settings, gpu, spec, PoolingFiles())
    return runner


SHAPES = [
    Shape([1], [1]),
    Shape([17, 3, 64], [17, 3, 64]),
    Shape([129, 40], [20, 40], dtype=torch.float16, block_size=32),
    Shape([65, 130], [1, 33], num_heads=3, num_kv_heads=1, head_dim=128),
    Shape([70, 9], [50, 9], window=1),
    Shape([70, 9], [50, 9], window=16, soft_cap=3.0),
    Shape([40, 16], [13, 16], kv_dtype=FP8, head_dim=128, dtype=torch.float16),
]


def attend(case: PagedCase, device: torch.device) -> None:
    """Compute a case's output by whatever `flashinfer` is."""
    shape = case.shape
    spec = AttentionSpec(shape.head_dim**-0.5, window=shape.window or None, soft_cap=shape.soft_cap or None)
    assert can_plan(spec, shape.head_dim)
    # What no sequence owns is NaN in a case, and zeros in a server.
    pool = case.kv.float().nan_to_num().to(case.kv.dtype).to(device)
    query, table = case.q.to(device), case.block_table.to(device)
    out = torch.full_like(query, torch.nan)
    planned = PlannedAttention(FlashInfer(device), spec, pool, query)
    planned.plan(table, list(zip(shape.queries, shape.contexts, strict=True)))
    planned.attend(CudaKvLayer(pool, *case.kv_scales), query, 0, out)
    case.out.copy_(out.cpu())
    assert_attended(case)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_equal_the_reference(package: ModuleType, device: Device, shape: Shape) -> None:
    attend(PagedCase(device, shape), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_the_package_equal_the_reference(shape: Shape) -> None:
    if find_device() is None:
        pytest.skip("no GPU, or an extension without CUDA")
    import_package()
    device: Any = GpuDevice(torch.device("cuda"))
    attend(PagedCase(device, shape), device.device)


async def test_prompts_in_chunks_beside_others_follow_the_reference(
    package: Any, tmp_path: Path, gpu: EmulatedDevice
) -> None:
    reference = make_model(**SHAPE)
    runner = make_runner(reference, tmp_path, gpu)
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper
    try:
        assert (len(wrapper.planned), wrapper.num_runs) == (1, 2), "the largest step is tried at the start"
        jobs = [Job((PROMPT * 3)[:n], m, WANTED) for n, m in ((49, 6), (1, 9), (17, 3))]
        await generate(runner, jobs, chunk=20)
    finally:
        runner.close()
    for job in jobs:
        assert_matches_reference(job, reference)
    # Steps of 20, 20, 9 + 1 + 10 and 7 prompt tokens: a plan each, that both layers run.
    assert (len(wrapper.planned), wrapper.num_runs) == (1 + 4, 2 * (1 + 4))


def test_as_many_plans_as_steps_in_flight_stay_as_they_are() -> None:
    assert flashinfer_stand_in.MAX_IN_FLIGHT == MAX_IN_FLIGHT


async def test_layers_of_several_kinds_have_a_plan_each(
    package: Any, tmp_path: Path, gpu: EmulatedDevice
) -> None:
    reference = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=160, hidden_size=128, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, sliding_window=8,
            max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=2,
        )
    ).eval()  # fmt: skip
    runner = make_runner(reference, tmp_path, gpu)
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper
    try:
        job = Job(PROMPT, 3, WANTED)
        await generate(runner, [job], chunk=10)
    finally:
        runner.close()
    assert_matches_reference(job, reference)
    num_steps = wrapper.num_runs // 4
    assert len(wrapper.planned) == 2 * num_steps


def test_what_flashinfer_does_not_have_keeps_the_native_kernel() -> None:
    heads = np.zeros(2, np.float32)
    assert can_plan(AttentionSpec(0.125, window=4, soft_cap=30.0), 64)
    assert not can_plan(AttentionSpec(0.125), 80)
    others: list[dict[str, Any]] = [{"chunk": 4}, {"sinks": heads}, {"slopes": heads}]
    assert not any(can_plan(AttentionSpec(0.125, **other), 64) for other in others)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(
        ModelLoadError, match="--prompt-attention flashinfer needs the package flashinfer-python"
    ):
        cuda_load.spec_of(Settings(prompt_attention="flashinfer"), FP16, 256)


async def test_batch_invariance_keeps_the_native_kernel(
    package: Any, tmp_path: Path, gpu: EmulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    make_runner(make_model(**SHAPE), tmp_path, gpu, batch_invariant=True).close()
    assert package.BatchPrefillWithPagedKVCacheWrapper.planned == []
    assert "--prompt-attention flashinfer is ignored" in caplog.text


@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_the_stand_in_has_the_package_s_arguments(method: str) -> None:
    package = import_package()
    theirs = inspect.signature(getattr(package.BatchPrefillWithPagedKVCacheWrapper, method)).parameters
    ours = inspect.signature(getattr(StandIn, method)).parameters
    for index, (name, parameter) in enumerate(ours.items()):
        assert name in theirs
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert list(theirs).index(name) == index


def import_package() -> Any:
    """Import FlashInfer, which imports without a GPU, too."""
    return pytest.importorskip("flashinfer", reason="FlashInfer is not installed", exc_type=ImportError)
