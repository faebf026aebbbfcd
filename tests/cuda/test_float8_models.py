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
from tests.support.checkpoints import make_model, save_tokenizer
from tests.support.quantised import save_quantised
from tests.support.runner_driver import Job, generate
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.ops.cuda_float8 import can_multiply
from tgi_asgi.ops.cuda_linear import MAX_EXACT_TOKENS
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

LONG = [i * 37 % 96 + 2 for i in range(52)]
assert len(LONG) > MAX_EXACT_TOKENS


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
    return load(Settings(**(given | changes)), files, lambda stage, done, total: None)


def open_model(directory: Path, kind: str | None, **changes: Any) -> LoadedModel:
    """Load a model with FP8 weights with scales of this kind, or with plain weights."""
    model = make_model(**SHAPE)
    if kind is None:
        return load_files(save_with_tokenizer(model, directory), **changes)
    files = save_quantised(model, directory, "fp8", kind=kind)
    save_tokenizer(directory)
    return load_files(files, **changes)


def rounded(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Round a product's activations to FP8, with a scale per token."""
    (x,) = given
    scales = x.abs().amax(-1, keepdim=True) / 448
    return ((x / scales).to(torch.float8_e4m3fn).to(x.dtype) * scales,)


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
        for name, module in reference.named_modules():
            if ".layers." in name and isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(rounded)  # from now on
    first, second = logprobs.values()
    assert first is not None and second is not None and abs(first - second) > 0.05
    assert len(fingerprints) == 2, "the bits differ, and so must the fingerprint"


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
