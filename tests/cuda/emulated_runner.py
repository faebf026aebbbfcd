"""The CUDA runner on emulated kernels, small models for it, and the checks of their text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest
import torch
import transformers

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.gpu_device import CountedGpu
from tests.emulation import bindings, library
from tests.support.checkpoints import save, save_tokenizer
from tests.support.kv import plain_limits, plain_size
from tests.support.runner_driver import Job
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.family import Model
from tgi_asgi.ops import StepLimits
from tgi_asgi.ops.cuda_adapters import CudaAdapterLayout
from tgi_asgi.ops.cuda_kv import CudaKvFormat
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import register_kernels
from tgi_asgi.runner.cuda_steps import CudaStepSpec
from tgi_asgi.runner.kv import KvSize

FP16 = torch.float16
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28]  # more than a block


ON_GPU = os.environ.get("TGI_TEST_GPU") == "1"  # these tests use a real GPU


def make_device() -> EmulatedDevice:
    """Return a device with its operators registered; skip the test if they cannot be built.

    With TGI_TEST_GPU=1 it is a real GPU.
    """
    if ON_GPU:
        register_kernels()
        return cast(EmulatedDevice, CountedGpu())
    library.require()
    bindings.install()
    return EmulatedDevice()


def spec_of_steps(
    limits: StepLimits, *, is_batch_invariant: bool = False, kv_dtype: torch.dtype = FP16
) -> CudaStepSpec:
    """Return steps in float16, with blocks of 16 tokens."""
    return CudaStepSpec(limits, CudaModes(FP16, is_batch_invariant), CudaKvFormat(16, kv_dtype))


def require_emulation(reason: str) -> None:
    """Skip the test on a real GPU."""
    if ON_GPU:
        pytest.skip(f"only on the emulated device: {reason}")


def make_runner(
    model: Model,
    device: EmulatedDevice,
    *,
    kv_dtype: torch.dtype = FP16,
    max_sequences: int = 2,
    max_context: int = 256,
    adapters: CudaAdapterLayout | None = None,
) -> CudaRunner:
    def choose(free_bytes: int) -> KvSize:
        return plain_size(40, "float16")

    return CudaRunner(
        model,
        device,
        choose,
        spec_of_steps(
            plain_limits(max_sequences=max_sequences, max_tokens=64, max_context=max_context),
            kv_dtype=kv_dtype,
        ),
        adapters=adapters,
    )


def assert_matches_reference(
    job: Job, reference: transformers.PreTrainedModel, *, tolerance: float = 0.02
) -> None:
    """Check each greedy token and its log-probability against the reference."""
    assert len(job.sampled) == job.num_tokens > 0
    expected = logprobs_of(reference, [*job.prompt_ids, *job.token_ids])[len(job.prompt_ids) - 1 : -1]
    for row, sampled in zip(expected, job.sampled, strict=True):
        assert float(row[sampled.token_id]) > float(row.max()) - tolerance, "not the best token"
        assert sampled.logprob == pytest.approx(float(row[sampled.token_id]), abs=tolerance)


def save_with_tokenizer(model: transformers.PreTrainedModel, directory: Path) -> ModelFiles:
    files = save(model, directory)
    save_tokenizer(directory)
    return files


def logprobs_of(reference: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = reference(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)
