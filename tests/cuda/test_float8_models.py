"""`--prompt-precision fp8`: models whose long steps are multiplied in FP8, and what is refused or ignored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import (
    ON_GPU,
    SHAPE,
    assert_matches_reference,
    make_device,
    save_with_tokenizer,
)
from tests.cuda.scaled_mm_stand_in import ScaledMmStandIn
from tests.support.checkpoints import make_model, save_tokenizer
from tests.support.quantised import save_quantised
from tests.support.runner_driver import Job, generate
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.ops.cuda_float8 import can_multiply
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

pytestmark = pytest.mark.thorough

LONG = [i * 37 % 96 + 2 for i in range(52)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDevice]:
    """A GPU; torch's own product for CPUs has scales per row, too."""
    device = make_device()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    can_multiply.cache_clear()
    yield device
    can_multiply.cache_clear()


def load_files(files: ModelFiles, **changes: Any) -> LoadedModel:
    given: dict[str, Any] = {
        "thread_nice": 0, "num_threads": 1, "max_batch_size": 2, "max_batch_prefill_tokens": 64,
        "max_total_tokens": 128, "dtype": "bfloat16", "prompt_precision": "fp8",
    }  # fmt: skip
    return load(Settings(**(given | changes)), files)


def open_model(directory: Path, kind: str | None, **changes: Any) -> LoadedModel:
    """Load a model with FP8 weights with scales of this kind, or with plain weights."""
    model = make_model(**SHAPE)
    if kind is None:
        return load_files(save_with_tokenizer(model, directory), **changes)
    files = save_quantised(model, directory, "fp8", kind=kind)
    save_tokenizer(directory)
    return load_files(files, **changes)


def round_products(reference: torch.nn.Module, group: int | None) -> None:
    """From now on, round the activations of layers' products to FP8, with a scale per token or group."""

    def rounded(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = given
        groups = x.unflatten(-1, (-1, group or x.shape[-1]))
        scales = groups.abs().amax(-1, keepdim=True) / 448
        return (((groups / scales).to(torch.float8_e4m3fn).to(x.dtype) * scales).flatten(-2),)

    for name, module in reference.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


async def test_long_prompts_are_in_float8(tmp_path: Path, device: EmulatedDevice) -> None:
    reference = make_model(**SHAPE)
    files = save_quantised(reference, tmp_path, "fp8", kind="row")
    save_tokenizer(tmp_path)
    logprobs, fingerprints = {}, set()
    for precision in ("auto", "fp8"):
        loaded = load_files(files, prompt_precision=precision)
        fingerprints.add(loaded.info.fingerprint)
        assert loaded.info.prompt_precision == (None if precision == "auto" else "fp8")
        job = Job(LONG, 1, SamplingParams(temperature=0.0, logprobs=0))
        try:
            await generate(loaded.runner, [job], chunk=64)
        finally:
            loaded.runner.close()
        assert_matches_reference(job, reference, tolerance=0.1)
        logprobs[precision] = job.sampled[0].logprob
        round_products(reference, None)
    first, second = logprobs.values()
    assert first is not None and second is not None and abs(first - second) > 0.05
    assert len(fingerprints) == 2, "the bits differ, and so must the fingerprint"


async def test_products_by_block_are_padded_in_graphs_and_without(
    tmp_path: Path, device: EmulatedDevice
) -> None:
    """Steps have a number of tokens that is not a multiple of four; the largest has most of all."""
    stand_in = None if ON_GPU else ScaledMmStandIn()
    shape = SHAPE | {
        "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    reference = make_model(**shape)
    files = save_quantised(reference, tmp_path, "fp8", kind="block", block=128)
    save_tokenizer(tmp_path)
    round_products(reference, 128)
    try:
        loaded = load_files(files, max_batch_size=3, max_batch_prefill_tokens=51, max_total_tokens=130)
        assert loaded.info.prompt_precision == "fp8"
        jobs = [Job(LONG[:count], 1, SamplingParams(temperature=0.0, logprobs=0)) for count in (51, 43)]
        try:
            for job in jobs:
                await generate(loaded.runner, [job], chunk=51)
        finally:
            loaded.runner.close()
        for job in jobs:
            # Values at the border of two codes fall to either side in bfloat16; `test_float8.py` is exact.
            assert_matches_reference(job, reference, tolerance=0.4)
        if stand_in is not None:
            assert {tokens % 4 for tokens, _, _ in stand_in.calls} == {0}
            assert {52, 44} & {tokens for tokens, _, _ in stand_in.calls}
    finally:
        if stand_in is not None:
            stand_in.close()


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (None, {}, "--prompt-precision fp8 changes nothing"),
        ("block", {}, "--prompt-precision fp8 changes nothing"),  # of 32 x 32
        ("row", {"batch_invariant": True}, "--prompt-precision fp8 is ignored: --batch-invariant"),
    ],
)
def test_a_setting_without_effect_is_told(
    tmp_path: Path,
    device: EmulatedDevice,
    caplog: pytest.LogCaptureFixture,
    kind: str | None,
    changes: dict[str, Any],
    text: str,
) -> None:
    loaded = open_model(tmp_path, kind, **changes)
    loaded.runner.close()
    assert text in caplog.text and loaded.info.prompt_precision is None


def test_a_gpu_has_no_int8_prompts(tmp_path: Path, device: EmulatedDevice) -> None:
    with pytest.raises(ModelLoadError, match="int8 is for CPUs: on a GPU it may be auto or fp8"):
        open_model(tmp_path, None, prompt_precision="int8")


def test_a_cpu_has_no_fp8_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: None)
    with pytest.raises(ModelLoadError, match="--prompt-precision fp8 is for GPUs"):
        open_model(tmp_path, None)


def test_the_real_product_passes_the_trial(device: EmulatedDevice) -> None:
    """torch has scales per row for CPUs, too."""
    assert can_multiply(device.device, torch.bfloat16, has_groups=False)
    if ON_GPU:
        assert can_multiply(device.device, torch.bfloat16, has_groups=True)
        assert can_multiply(device.device, torch.float16, has_groups=False)
